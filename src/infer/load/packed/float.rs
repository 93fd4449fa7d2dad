//! Eight- and four-bit floating point numbers, and matrices of them: each value times the scale of
//! its block, in F32.
//!
//! Source: OCP Microscaling Formats v1.0 (e4m3, e2m1, E8M0).

use super::super::Result;
use super::super::checkpoint::{Form, Stored};
use super::Matrix;
use super::parts::Parts;
use doppler_store::DType;

/// An e4m3 number (the form without infinities; 0x7f is NaN).
pub fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let value = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2_f32.powi(-9),
        _ => (8.0 + fraction) * 2_f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { value } else { -value }
}

/// An e2m1 number.
pub fn e2m1(nibble: u8) -> f32 {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = VALUES[usize::from(nibble & 7)];
    if nibble & 8 == 0 { value } else { -value }
}

/// An E8M0 scale: a power of two. 255 is NaN.
pub fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// How a method stores numbers and scales.
pub trait Numbers: Send + Sync {
    /// Some rows of numbers, as stored: unpacked, not yet scaled.
    fn numbers(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>>;

    /// The scale of each block of columns of each of these rows.
    fn scales(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>>;
}

/// A matrix of scaled numbers.
pub struct Floats<N> {
    cols: usize,
    /// Columns that share a scale.
    block: usize,
    numbers: N,
}

impl<N: Numbers> Floats<N> {
    /// `dims` is the shape of the whole tensor.
    pub fn new(what: String, dims: Vec<u64>, block: u64, numbers: N) -> (Stored, Self) {
        let cols = dims.last().map_or(1, |cols| *cols as usize);
        let stored = Stored { shape: dims, form: Form::Decoded { what, dtype: DType::F32 } };
        (stored, Self { cols, block: block as usize, numbers })
    }
}

impl<N: Numbers> Matrix for Floats<N> {
    fn read(&self, parts: &Parts<'_>, first: u64, out: &mut [u8]) -> Result<()> {
        let row = 4 * self.cols;
        let count = (out.len() / row) as u64;
        let numbers = self.numbers.numbers(parts, first, count)?;
        let scales = self.numbers.scales(parts, first, count)?;
        let blocks = self.cols.div_ceil(self.block);
        let rows = out.chunks_exact_mut(row).zip(numbers.chunks_exact(self.cols));
        for ((out, numbers), scales) in rows.zip(scales.chunks_exact(blocks)) {
            let out = out.chunks_mut(4 * self.block).zip(numbers.chunks(self.block));
            for ((out, numbers), scale) in out.zip(scales) {
                for (out, number) in out.as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
                    *out = (number * scale).to_le_bytes();
                }
            }
        }
        Ok(())
    }
}
