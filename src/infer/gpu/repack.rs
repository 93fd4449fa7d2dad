//! Stored blocks to device planes and back.
//!
//! A stored row is blocks of odd sizes (Q6_K: 210 bytes). On the device a matrix
//! is planes: plane p holds bytes `from .. from + len` of every block, block after
//! block, row after row, and the planes follow one another, widest first, so that
//! quants, bits and scales are each read in aligned words:
//!
//! | format | planes, bytes of a block |
//! |---|---|
//! | Q4_K | quants 128, d dmin scales 16 |
//! | Q5_K | quants 128, fifth bits 32, d dmin scales 16 |
//! | Q6_K | low 128, high 64, scales 16, d 2 |
//! | Q8_0 | quants 32, d 2 |
//! | Q5_0 | quants 16, fifth bits 4, d 2 |
//! | F32, F16, BF16 | one plane; a row is padded with zeros to 32 weights |
//!
//! A matrix takes no more bytes than it does when stored, rounded up to 16 (and to
//! 32 weights a row for the plain formats). The shard's hash stays on the stored
//! bytes; the planes are never sent anywhere.

use super::params::Matrix;
use crate::infer::graph::MatrixSpec;
use crate::store::DType;

/// Weights the kernels take at a time.
pub(super) const UNIT: usize = 32;

/// A plane's share of each stored block.
#[derive(Debug, Clone, Copy)]
struct Plane {
    from: usize,
    len: usize,
}

const fn plane(from: usize, len: usize) -> Plane {
    Plane { from, len }
}

const Q4_K: &[Plane] = &[plane(16, 128), plane(0, 16)];
const Q5_K: &[Plane] = &[plane(48, 128), plane(16, 32), plane(0, 16)];
const Q6_K: &[Plane] = &[plane(0, 128), plane(128, 64), plane(192, 16), plane(208, 2)];
const Q8_0: &[Plane] = &[plane(2, 32), plane(0, 2)];
const Q5_0: &[Plane] = &[plane(6, 16), plane(2, 4), plane(0, 2)];

/// `None` for the plain formats.
const fn planes(dtype: DType) -> Option<&'static [Plane]> {
    match dtype {
        DType::F32 | DType::F16 | DType::Bf16 => None,
        DType::Q4K => Some(Q4_K),
        DType::Q5K => Some(Q5_K),
        DType::Q6K => Some(Q6_K),
        DType::Q8_0 => Some(Q8_0),
        DType::Q5_0 => Some(Q5_0),
    }
}

/// The shape of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
}

impl Packed {
    pub const fn of(spec: &MatrixSpec) -> Self {
        Self { dtype: spec.dtype, rows: spec.rows, cols: spec.cols }
    }

    /// Device blocks of one row; a plain format's block is a unit.
    const fn row_blocks(&self) -> usize {
        match planes(self.dtype) {
            Some(_) => self.cols.div_ceil(self.dtype.block_len()),
            None => self.cols.div_ceil(UNIT),
        }
    }

    /// Device bytes of one row.
    pub const fn row_bytes(&self) -> usize {
        match planes(self.dtype) {
            Some(_) => self.dtype.row_bytes(self.cols),
            None => self.row_blocks() * UNIT * self.dtype.block_bytes(),
        }
    }

    /// Device bytes, a multiple of 16.
    pub const fn bytes(&self) -> usize {
        (self.rows * self.row_bytes()).next_multiple_of(16)
    }

    /// What a kernel needs to know, for planes that begin at byte `offset` of the binding.
    pub fn matrix(&self, offset: usize) -> Matrix {
        let word = |n: usize| u32::try_from(n).expect("a binding has fewer than 2^32 bytes");
        Matrix {
            base: word(offset / 4),
            blocks: word(self.rows * self.row_blocks()),
            row_blocks: word(self.row_blocks()),
            units: word(self.cols.div_ceil(UNIT)),
        }
    }

    /// Appends the planes of `stored` (whole stored rows) to `out`.
    ///
    /// # Panics
    /// If `stored` is not exactly `rows` stored rows; callers check sizes where bytes enter.
    pub fn pack(&self, stored: &[u8], out: &mut Vec<u8>) {
        let stored_row = self.dtype.row_bytes(self.cols);
        assert_eq!(stored.len(), self.rows * stored_row);
        let start = out.len();
        out.reserve(self.bytes());
        match planes(self.dtype) {
            Some(planes) => {
                for plane in planes {
                    for block in stored.chunks_exact(self.dtype.block_bytes()) {
                        out.extend_from_slice(&block[plane.from..plane.from + plane.len]);
                    }
                }
            }
            None => {
                for row in 0..self.rows {
                    out.extend_from_slice(&stored[row * stored_row..][..stored_row]);
                    out.resize(start + (row + 1) * self.row_bytes(), 0);
                }
            }
        }
        out.resize(start + self.bytes(), 0);
    }

    /// The inverse of `pack`: the stored rows.
    #[cfg(test)]
    fn unpack(&self, packed: &[u8]) -> Vec<u8> {
        let stored_row = self.dtype.row_bytes(self.cols);
        let mut stored = vec![0; self.rows * stored_row];
        let Some(planes) = planes(self.dtype) else {
            for (row, to) in stored.chunks_exact_mut(stored_row.max(1)).enumerate() {
                to.copy_from_slice(&packed[row * self.row_bytes()..][..stored_row]);
            }
            return stored;
        };
        let mut at = 0;
        for plane in planes {
            for block in stored.chunks_exact_mut(self.dtype.block_bytes()) {
                block[plane.from..plane.from + plane.len]
                    .copy_from_slice(&packed[at..at + plane.len]);
                at += plane.len;
            }
        }
        stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::gpu::tests::Random;

    #[test]
    fn planes_cover_each_block_once_and_begin_on_words() {
        for dtype in DType::ALL {
            let Some(planes) = planes(dtype) else { continue };
            let mut covered: Vec<usize> =
                planes.iter().flat_map(|p| p.from..p.from + p.len).collect();
            covered.sort_unstable();
            assert_eq!(covered, (0..dtype.block_bytes()).collect::<Vec<_>>(), "{dtype}");
            // Only the last plane may end between words.
            for plane in &planes[..planes.len() - 1] {
                assert_eq!(plane.len % 4, 0, "{dtype}");
            }
        }
    }

    #[test]
    fn packing_is_undone_by_unpacking() {
        let mut random = Random::new("repack");
        for dtype in DType::ALL {
            for (rows, cols) in [(1, 256), (3, 512), (5, 768), (7, 33), (2, 1)] {
                let packed = Packed { dtype, rows, cols };
                let stored = random.bytes(rows * dtype.row_bytes(cols));
                let mut planes = vec![9; 4];
                packed.pack(&stored, &mut planes);
                assert_eq!(planes.len(), 4 + packed.bytes());
                assert_eq!(packed.bytes() % 16, 0);
                assert_eq!(packed.unpack(&planes[4..]), stored, "{dtype} {rows}x{cols}");
            }
        }
    }
}
