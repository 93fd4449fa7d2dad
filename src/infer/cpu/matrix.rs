//! Stored matrices: rows of blocks as they lie in the shard, unpacked to f32 on the way.
//!
//! Weights stay in their stored format in memory; nothing here keeps an f32 copy.

use crate::infer::graph::MatrixSpec;
use crate::infer::quant;
use crate::store::DType;

/// A matrix over stored bytes.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// The matrix `spec` within `bytes`.
    ///
    /// # Panics
    /// If it does not lie within them: the caller checked sizes when it loaded them.
    pub fn new(spec: &MatrixSpec, bytes: &'a [u8]) -> Self {
        let bytes = &bytes[spec.offset..spec.offset + spec.bytes()];
        Self { dtype: spec.dtype, rows: spec.rows, cols: spec.cols, bytes }
    }

    /// Row `row`'s blocks.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let len = self.dtype.row_bytes(self.cols);
        &self.bytes[row * len..(row + 1) * len]
    }

    /// Row `row` as f32, `cols` of them.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        unpack(self.dtype, self.row(row), &mut out[..self.cols]);
    }
}

/// Unpacks the start of a row, `out.len()` weights, from whole blocks.
#[inline(always)]
pub fn unpack(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        DType::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        DType::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = half_to_f32(u16::from_le_bytes([b[0], b[1]]));
            }
        }
        quantised => quant::dequantize(quantised, bytes, out.len(), out),
    }
}

/// IEEE 754 half to single precision without a branch, so that loops of it vectorise.
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    // Re-biasing the exponent by a multiplication also normalises subnormals.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let infinite = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | infinite | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            let same = ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan());
            assert!(same, "half {bits:#06x}: {ours} against {theirs}");
        }
    }
}
