//! Matrices on the device: their size, where their planes begin, and how stored blocks become
//! planes.
//!
//! Each format defines its planes (see `quant::planes`). A packed matrix is a multiple of 16 bytes.

use super::params::Matrix;
use crate::graph::MatrixSpec;
use crate::quant::planes;
pub(super) use crate::quant::planes::UNIT;
use doppler_store::DType;

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

    /// Device blocks of one row. They have the format's block length and come in whole groups; a
    /// plain format's block is a unit.
    fn row_blocks(&self) -> usize {
        let planes = planes::of(self.dtype);
        let groups = planes.groups(self.cols);
        if self.dtype.is_quantised() { groups * planes.together } else { groups }
    }

    /// Device bytes of one row.
    pub fn row_bytes(&self) -> usize {
        let planes = planes::of(self.dtype);
        planes.groups(self.cols) * planes.bytes()
    }

    /// Device bytes, a multiple of 16.
    pub fn bytes(&self) -> usize {
        (self.rows * self.row_bytes()).next_multiple_of(16)
    }

    /// The kernels' description of a matrix whose planes begin at byte `offset` of the binding.
    pub fn matrix(&self, offset: usize) -> Matrix {
        let word = |n: usize| u32::try_from(n).expect("a binding has fewer than 2^32 bytes");
        Matrix {
            base: word(offset / 4),
            blocks: word(self.rows * self.row_blocks()),
            row_blocks: word(self.row_blocks()),
            units: word(self.cols.div_ceil(UNIT)),
        }
    }

    /// Writes the planes of `stored` (whole stored rows) to `out`, overwriting it.
    ///
    /// # Panics
    /// If `stored` is not exactly `rows` stored rows or `out` is not [`Packed::bytes`] long.
    /// Callers check sizes where bytes enter.
    pub fn pack(&self, stored: &[u8], out: &mut [u8]) {
        assert_eq!(stored.len(), self.rows * self.dtype.row_bytes(self.cols));
        assert_eq!(out.len(), self.bytes());
        planes::of(self.dtype).pack(self.cols, stored, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::Random;
    use crate::quant;
    use crate::quant::planes::HALF;

    /// A word of the planes that begin at `out`.
    fn word(out: &[u8], i: usize) -> u32 {
        u32::from_le_bytes(out[i * 4..][..4].try_into().unwrap())
    }

    /// Row `row` as the kernels see it: quants by column, from the planes alone.
    fn quants(packed: &Packed, out: &[u8], row: usize) -> Vec<i32> {
        let m = packed.matrix(0);
        let (blocks, pieces) = (m.blocks as usize, packed.cols.div_ceil(64) * 2);
        let block_pieces = if m.row_blocks as usize == pieces { 1 } else { 8 };
        let first = row * m.row_blocks as usize * block_pieces;
        let mut got = vec![0; pieces * UNIT];
        for piece in 0..pieces {
            let at = first + piece;
            for j in 0..UNIT {
                let (second, j16) = (j / HALF, j % HALF);
                let (k, b) = (j16 / 4, j16 % 4);
                let nibble = |word: u32| ((word >> (8 * b + 4 * second)) & 15) as i32;
                let fifth = |word: u32| (((word >> (8 * b + k + 4 * second)) & 1) << 4) as i32;
                let q = match packed.dtype {
                    DType::Q4K => nibble(word(out, at * 4 + k)),
                    DType::Q5K => {
                        nibble(word(out, at * 4 + k)) | fifth(word(out, blocks * 32 + at))
                    }
                    DType::Q5_0 => {
                        (nibble(word(out, at * 4 + k)) | fifth(word(out, blocks * 4 + at))) - 16
                    }
                    DType::Q6K => {
                        let high = word(out, blocks * 32 + at * 2 + second) >> (8 * b + 2 * k);
                        (nibble(word(out, at * 4 + k)) | ((high & 3) << 4) as i32) - 32
                    }
                    _ => (word(out, at * 8 + second * 4 + k) >> (8 * b)) as u8 as i8 as i32,
                };
                got[64 * (piece / 2) + 32 * second + HALF * (piece % 2) + j16] = q;
            }
        }
        got.truncate(packed.cols);
        got
    }

    /// The quants of a stored row, by the format's description.
    fn stored_quants(dtype: DType, row: &[u8]) -> Vec<i32> {
        let mut got = Vec::new();
        for b in row.chunks_exact(dtype.block_bytes()) {
            let nibble = |at: usize, l: usize, high: bool| {
                i32::from(if high { b[at + l] >> 4 } else { b[at + l] & 15 })
            };
            let bit = |at: usize, i: usize| i32::from((b[at + i / 8] >> (i % 8)) & 1);
            for i in 0..dtype.block_len() {
                let (c, l) = (i / 64, i % 32);
                let high = i % 64 >= 32;
                got.push(match dtype {
                    DType::Q4K => nibble(16, 32 * c + l, high),
                    DType::Q5K => {
                        let fifth = (b[16 + l] >> (2 * c + usize::from(high))) & 1;
                        nibble(48, 32 * c + l, high) | (i32::from(fifth) << 4)
                    }
                    DType::Q6K => {
                        let (n, run) = (i / 128, (i % 128) / 32);
                        let low = nibble(0, 64 * n + 32 * (run % 2) + l, run >= 2);
                        let top = (b[128 + 32 * n + l] >> (2 * run)) & 3;
                        (low | (i32::from(top) << 4)) - 32
                    }
                    DType::Q5_0 => (nibble(6, i % 16, i >= 16) | (bit(2, i) << 4)) - 16,
                    _ => i32::from(b[2 + i] as i8),
                });
            }
        }
        got
    }

    #[test]
    fn every_quant_is_found_where_the_kernels_look() {
        let mut random = Random::new("repack");
        for dtype in [DType::Q4K, DType::Q5K, DType::Q6K, DType::Q8_0, DType::Q5_0] {
            for (rows, cols) in [(1, 256), (3, 512), (5, 768), (7, 32), (2, 96), (3, 64)] {
                if cols % dtype.block_len() != 0 {
                    continue;
                }
                let packed = Packed { dtype, rows, cols };
                let stored = random.bytes(rows * dtype.row_bytes(cols));
                let mut out = vec![9; packed.bytes()];
                packed.pack(&stored, &mut out);
                assert_eq!(packed.bytes() % 16, 0);
                for (row, stored) in stored.chunks_exact(dtype.row_bytes(cols)).enumerate() {
                    let got = quants(&packed, &out, row);
                    assert_eq!(
                        got,
                        stored_quants(dtype, stored),
                        "{dtype} {rows}x{cols} row {row}"
                    );
                }
            }
        }
    }

    /// The results that the page's own repacking (web/src/engine/planes.ts) must match, checked for
    /// this one, too: BLAKE3 of the planes of bytes that xorshift (Marsaglia, 2003) makes from a
    /// seed.
    #[test]
    fn planes_are_those_that_the_page_is_held_to() {
        let listed = include_str!("../../../tests/data/tab/planes.json");
        let listed: Vec<(String, usize, usize, u32, String)> =
            serde_json::from_str(listed).unwrap();
        let formats: std::collections::HashSet<_> = listed.iter().map(|row| &row.0).collect();
        assert!(formats.len() >= 8);
        for (format, rows, cols, seed, hash) in &listed {
            let dtype = DType::ALL.into_iter().find(|d| d.file_name() == format);
            let packed = Packed { dtype: dtype.unwrap(), rows: *rows, cols: *cols };
            let mut state = *seed;
            let mut byte = || {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as u8
            };
            let stored: Vec<u8> =
                (0..rows * packed.dtype.row_bytes(*cols)).map(|_| byte()).collect();
            let mut out = vec![9; packed.bytes()];
            packed.pack(&stored, &mut out);
            let got = blake3::hash(&out).to_hex();
            assert_eq!(got.as_str(), hash, "{format} {rows}x{cols} from {seed}");
        }
    }

    #[test]
    fn plain_rows_are_padded_and_scales_follow_the_quants() {
        let mut random = Random::new("repack plain");
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let packed = Packed { dtype, rows: 3, cols: 33 };
            let stored = random.bytes(3 * dtype.row_bytes(33));
            let mut out = vec![9; packed.bytes()];
            packed.pack(&stored, &mut out);
            for (row, stored) in stored.chunks_exact(dtype.row_bytes(33)).enumerate() {
                let got = &out[row * packed.row_bytes()..][..packed.row_bytes()];
                assert_eq!(&got[..stored.len()], stored);
                assert!(got[stored.len()..].iter().all(|b| *b == 0));
            }
        }
        // One block, paired with zeros: the scale is the first half-word after the quants.
        let mut stored = Vec::new();
        quant::quantize(DType::Q8_0, &random.floats(32), &mut stored).unwrap();
        let packed = Packed { dtype: DType::Q8_0, rows: 1, cols: 32 };
        let mut out = vec![9; packed.bytes()];
        packed.pack(&stored, &mut out);
        assert_eq!((&out[64..66], &out[66..68]), (&stored[..2], &[0, 0][..]));
    }
}
