//! Stored matrices: rows of blocks as they are in the shard, unpacked to f32 on the fly.
//!
//! Weights stay in memory in their stored format; nothing here keeps an f32 copy.

use super::unpack::unpack;
use crate::graph::MatrixSpec;
use doppler_store::DType;

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
    /// If it does not fit into them. The caller checked sizes when it loaded them.
    pub fn new(spec: &MatrixSpec, bytes: &'a [u8]) -> Self {
        let bytes = &bytes[spec.offset..spec.offset + spec.bytes()];
        Self { dtype: spec.dtype, rows: spec.rows, cols: spec.cols, bytes }
    }

    /// Row `row`'s blocks.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let len = self.dtype.row_bytes(self.cols);
        &self.bytes[row * len..(row + 1) * len]
    }

    /// Weights of an unpacked row: `cols` rounded up to whole blocks.
    pub const fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(self.dtype.block_len())
    }

    /// Row `row` as f32, `cols` of them.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        let mut padded = vec![0.0; self.padded_cols()];
        unpack(self.dtype, self.row(row), &mut padded);
        out.copy_from_slice(&padded[..self.cols]);
    }
}
