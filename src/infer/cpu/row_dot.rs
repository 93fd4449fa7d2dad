//! Inner products of stored rows with one vector, without unpacking to f32 first.
//!
//! A block's whole numbers meet `x` as they are; scales multiply sums of 16 or
//! 32, and what is subtracted from every weight of a group (Q4_K's and Q5_K's
//! mins) multiplies the sum of the group's `x`, taken once for all rows.

use super::lanes::{Kernel, Lanes};
use super::matrix::Matrix;
use super::unpack::{half_at, unpack};
use crate::store::DType;

/// Weights unpacked at a time where a type has no kernel here.
const CHUNK: usize = 256;

/// A vector made ready for any number of rows.
#[derive(Debug, Default)]
pub struct Input {
    /// Padded with zeros to whole blocks of 256.
    x: Vec<f32>,
    /// Sums of 32.
    sums: Vec<f32>,
}

impl Input {
    pub fn new(x: &[f32]) -> Self {
        let mut padded = Vec::with_capacity(x.len().next_multiple_of(256));
        padded.extend_from_slice(x);
        padded.resize(x.len().next_multiple_of(256), 0.0);
        let sums = padded.as_chunks::<32>().0.iter().map(|group| {
            let mut lanes = [0.0; 8];
            for eight in group.as_chunks::<8>().0 {
                for (lane, x) in lanes.iter_mut().zip(eight) {
                    *lane += x;
                }
            }
            lanes.iter().sum()
        });
        Self { sums: sums.collect(), x: padded }
    }
}

/// `out[i] = weight[first + i] . x`.
pub struct RowDots<'a> {
    pub input: &'a Input,
    pub weight: Matrix<'a>,
    pub first: usize,
    pub out: &'a mut [f32],
}

impl Kernel for RowDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { input, weight, first, out } = self;
        let (x, sums) = (input.x.as_slice(), input.sums.as_slice());
        let rows = (first..).map(|row| weight.row(row)).zip(out);
        match weight.dtype {
            DType::Q4K => rows.for_each(|(row, out)| *out = q4_k(l, row, x, sums)),
            DType::Q5K => rows.for_each(|(row, out)| *out = q5_k(l, row, x, sums)),
            DType::Q6K => rows.for_each(|(row, out)| *out = q6_k(l, row, x)),
            DType::Q8_0 => rows.for_each(|(row, out)| *out = q8_0(l, row, x)),
            DType::Q5_0 => rows.for_each(|(row, out)| *out = q5_0(l, row, x)),
            DType::F32 | DType::F16 | DType::Bf16 => {
                rows.for_each(|(row, out)| *out = plain(l, weight.dtype, row, x));
            }
        }
    }
}

/// Types of one number a weight: unpacked chunk by chunk in cache.
#[inline(always)]
fn plain<L: Lanes>(l: L, dtype: DType, row: &[u8], x: &[f32]) -> f32 {
    let mut unpacked = [0.0; CHUNK];
    let mut acc = [l.splat(0.0); 4];
    for (row, x) in row.chunks(CHUNK * dtype.block_bytes()).zip(x.as_chunks::<CHUNK>().0) {
        unpack(dtype, row, &mut unpacked[..row.len() / dtype.block_bytes()]);
        unpacked[row.len() / dtype.block_bytes()..].fill(0.0);
        for (w, x) in unpacked.as_chunks::<32>().0.iter().zip(x.as_chunks::<32>().0) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = l.fma(l.load(&eights(w)[i]), l.load(&eights(x)[i]), *acc);
            }
        }
    }
    l.sum(l.add(l.add(acc[0], acc[1]), l.add(acc[2], acc[3])))
}

/// The eight-wide pieces of a group.
#[inline(always)]
pub fn eights<T, const N: usize>(of: &[T; N]) -> &[[T; 8]] {
    of.as_chunks::<8>().0
}

/// Lane sums of `q . x`.
#[inline(always)]
fn products<L: Lanes, const N: usize>(l: L, q: &[i8; N], x: &[f32; N]) -> L::V {
    let (q, x) = (eights(q), eights(x));
    let mut sum = l.mul(l.signed(&q[0]), l.load(&x[0]));
    for i in 1..N / 8 {
        sum = l.fma(l.signed(&q[i]), l.load(&x[i]), sum);
    }
    sum
}

/// Eight six-bit scales and eight mins out of twelve bytes, times `d` and `dmin`.
#[inline(always)]
pub fn scales_mins<L: Lanes>(l: L, block: &[u8]) -> ([f32; 8], L::V) {
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let (a, b, c) = (word(4), word(8), word(12));
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let pair = |low: u32, high: u32| (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    let scales = pair(a & six, c & four | a >> 2 & two);
    let mins = pair(b & six, c >> 4 & four | b >> 2 & two);
    let (d, dmin) = (l.splat(half_at(block, 0)), l.splat(half_at(block, 2)));
    let number = |six_bits: [u8; 8]| l.signed(&bytemuck::cast(six_bits));
    (l.store(l.mul(d, number(scales))), l.mul(dmin, number(mins)))
}

#[inline(always)]
fn q4_k<L: Lanes>(l: L, row: &[u8], x: &[f32], sums: &[f32]) -> f32 {
    let mut acc = [l.splat(0.0); 2];
    let mut below = l.splat(0.0);
    let blocks = row.as_chunks::<144>().0.iter().zip(x.as_chunks::<256>().0);
    for ((block, x), sums) in blocks.zip(sums.as_chunks::<8>().0) {
        let (scales, mins) = scales_mins(l, block);
        below = l.fma(mins, l.load(sums), below);
        let (quants, x) = (block[16..].as_chunks::<8>().0, eights(x));
        for pair in 0..4 {
            let (q, x) = (&quants[4 * pair..4 * pair + 4], &x[8 * pair..8 * pair + 8]);
            let [low, high] = l.nibbles(&q[0]);
            let mut sum = [l.mul(low, l.load(&x[0])), l.mul(high, l.load(&x[4]))];
            for i in 1..4 {
                let [low, high] = l.nibbles(&q[i]);
                sum[0] = l.fma(low, l.load(&x[i]), sum[0]);
                sum[1] = l.fma(high, l.load(&x[4 + i]), sum[1]);
            }
            for i in 0..2 {
                acc[i] = l.fma(l.splat(scales[2 * pair + i]), sum[i], acc[i]);
            }
        }
    }
    l.sum(l.fma(l.splat(-1.0), below, l.add(acc[0], acc[1])))
}

#[inline(always)]
fn q5_k<L: Lanes>(l: L, row: &[u8], x: &[f32], sums: &[f32]) -> f32 {
    let mut acc = [l.splat(0.0); 2];
    let mut below = l.splat(0.0);
    let blocks = row.as_chunks::<176>().0.iter().zip(x.as_chunks::<256>().0);
    for ((block, x), sums) in blocks.zip(sums.as_chunks::<8>().0) {
        let (scales, mins) = scales_mins(l, block);
        below = l.fma(mins, l.load(sums), below);
        let mut fifths: [u8; 32] = *block[16..].first_chunk().expect("in block");
        let (quants, x) = (block[48..].as_chunks::<32>().0, x.as_chunks::<32>().0);
        for (pair, quants) in quants.iter().enumerate() {
            let mut q = [[0_i8; 32]; 2];
            // Constant shifts: a vector of bytes has no other.
            for i in 0..32 {
                q[0][i] = (quants[i] & 15 | (fifths[i] & 1) << 4).cast_signed();
                q[1][i] = (quants[i] >> 4 | (fifths[i] & 2) << 3).cast_signed();
            }
            fifths.iter_mut().for_each(|bits| *bits >>= 2);
            for (side, q) in q.iter().enumerate() {
                let g = 2 * pair + side;
                acc[side] = l.fma(l.splat(scales[g]), products(l, q, &x[g]), acc[side]);
            }
        }
    }
    l.sum(l.fma(l.splat(-1.0), below, l.add(acc[0], acc[1])))
}

/// The levels of half a Q6_K block, less 32: four quarters.
#[inline(always)]
pub fn q6_levels(block: &[u8; 210], half: usize) -> [[i8; 32]; 4] {
    let rows = block.as_chunks::<32>().0;
    let (low0, low1, high) = (&rows[2 * half], &rows[2 * half + 1], &rows[4 + half]);
    let mut q = [[0_i8; 32]; 4];
    for i in 0..32 {
        q[0][i] = (low0[i] & 15 | (high[i] & 3) << 4).cast_signed() - 32;
        q[1][i] = (low1[i] & 15 | (high[i] >> 2 & 3) << 4).cast_signed() - 32;
        q[2][i] = (low0[i] >> 4 | (high[i] >> 4 & 3) << 4).cast_signed() - 32;
        q[3][i] = (low1[i] >> 4 | (high[i] >> 6) << 4).cast_signed() - 32;
    }
    q
}

/// `d * scale` of a Q6_K block's halves, 16 weights each.
#[inline(always)]
pub fn q6_scales<L: Lanes>(l: L, block: &[u8; 210]) -> [[f32; 8]; 2] {
    let d = l.splat(half_at(block, 208));
    let stored = block[192..].first_chunk::<16>().expect("in block");
    let stored: &[i8; 16] = bytemuck::cast_ref(stored);
    let [low, high] = [l.signed(&eights(stored)[0]), l.signed(&eights(stored)[1])];
    [l.store(l.mul(d, low)), l.store(l.mul(d, high))]
}

#[inline(always)]
fn q6_k<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
    let mut acc = [l.splat(0.0); 2];
    for (block, x) in row.as_chunks::<210>().0.iter().zip(x.as_chunks::<256>().0) {
        let scales = q6_scales(l, block);
        let x = x.as_chunks::<16>().0;
        for half in 0..2 {
            let q = q6_levels(block, half);
            for (quarter, q) in q.iter().enumerate() {
                for (side, q) in q.as_chunks::<16>().0.iter().enumerate() {
                    let group = 2 * quarter + side;
                    let sum = products(l, q, &x[8 * half + group]);
                    acc[side] = l.fma(l.splat(scales[half][group]), sum, acc[side]);
                }
            }
        }
    }
    l.sum(l.add(acc[0], acc[1]))
}

#[inline(always)]
fn q8_0<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
    let mut acc = [l.splat(0.0); 2];
    for (i, (block, x)) in row.as_chunks::<34>().0.iter().zip(x.as_chunks::<32>().0).enumerate() {
        let q: &[i8; 32] = bytemuck::cast_ref(block.last_chunk::<32>().expect("in block"));
        acc[i % 2] = l.fma(l.splat(half_at(block, 0)), products(l, q, x), acc[i % 2]);
    }
    l.sum(l.add(acc[0], acc[1]))
}

#[inline(always)]
fn q5_0<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
    let mut acc = l.splat(0.0);
    for (block, x) in row.as_chunks::<22>().0.iter().zip(x.as_chunks::<32>().0) {
        let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        let nibbles: &[u8; 16] = block.last_chunk().expect("in block");
        let mut q = [0_i8; 32];
        for i in 0..16 {
            let fifths = [(fifth >> i << 4 & 16) as u8, (fifth >> (i + 16) << 4 & 16) as u8];
            q[i] = (nibbles[i] & 15 | fifths[0]).cast_signed() - 16;
            q[i + 16] = (nibbles[i] >> 4 | fifths[1]).cast_signed() - 16;
        }
        acc = l.fma(l.splat(half_at(block, 0)), products(l, &q, x), acc);
    }
    l.sum(acc)
}
