//! Stored blocks to device planes.
//!
//! A stored row is blocks of odd sizes (Q6_K: 210 bytes). On the device a quantised
//! matrix is planes, one after the other, widest first, each read in aligned words.
//! Their unit is the piece: 32 weights that an invocation takes at once, the
//! sixteen from `64 g + 16 h` and the sixteen from `64 g + 32 + 16 h` of a row
//! (piece `2 g + h`). All formats cut rows the same way, so that one arrangement of
//! the activations serves them all (kernels/shared/pieces.wgsl):
//!
//! | format | planes |
//! |---|---|
//! | Q4_K | nibbles, 16 bytes a piece; d, dmin, scales, 16 bytes a block |
//! | Q5_K | nibbles, 16 a piece; fifth bits, 4 a piece; d, dmin, scales, 16 a block |
//! | Q6_K | nibbles, 16 a piece; high bits, 8 a piece; scales, 16 a block; d, 2 a block |
//! | Q8_0 | quants, 32 a piece; d, 2 a block |
//! | Q5_0 | nibbles, 16 a piece; fifth bits, 4 a piece; d, 2 a block |
//! | F32, F16, BF16 | one plane, rows as stored, padded with zeros to 32 weights |
//!
//! Nibbles: byte `j` holds weight `j` of the piece's first sixteen in its low
//! half and of its second in its high half. Fifth bits: byte `b`, bit `k` belongs to
//! weight `4 k + b` of the first sixteen, bit `k + 4` of the second. High bits: two
//! words, one for each sixteen; byte `b`, bits `2 k` and up belong to weight `4 k + b`.
//! Quants of Q8_0: the first sixteen, then the second.
//!
//! A row of Q8_0 or Q5_0 is padded with a block of zeros to whole pairs of blocks.
//! The shard's hash stays on the stored bytes; the planes are never sent anywhere.

use rayon::prelude::*;

use super::params::Matrix;
use crate::graph::MatrixSpec;
use doppler_store::DType;

/// Weights the kernels take at a time.
pub(super) const UNIT: usize = 32;

/// Weights of half a piece: they share a scale in every format.
const HALF: usize = 16;

/// Blocks that one task repacks.
const BLOCKS_A_TASK: usize = 256;

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

    /// Device blocks of one row: of the format's own length, whole pairs of them where they
    /// are 32 long; a plain format's block is a unit.
    const fn row_blocks(&self) -> usize {
        match self.dtype {
            DType::Q4K | DType::Q5K | DType::Q6K => self.cols.div_ceil(256),
            DType::Q8_0 | DType::Q5_0 => self.cols.div_ceil(64) * 2,
            DType::F32 | DType::F16 | DType::Bf16 => self.cols.div_ceil(UNIT),
        }
    }

    /// Device bytes of one row.
    pub const fn row_bytes(&self) -> usize {
        match self.dtype {
            DType::F32 | DType::F16 | DType::Bf16 => {
                self.row_blocks() * UNIT * self.dtype.block_bytes()
            }
            _ => self.row_blocks() * self.dtype.block_bytes(),
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
        let blocks = || stored.chunks_exact(self.dtype.block_bytes());
        match self.dtype {
            DType::Q4K => {
                blocks().for_each(|b| out.extend_from_slice(&b[16..]));
                blocks().for_each(|b| out.extend_from_slice(&b[..16]));
            }
            DType::Q5K => {
                blocks().for_each(|b| out.extend_from_slice(&b[48..]));
                blocks().for_each(|b| fifth_bits_k(b[16..48].try_into().expect("32 of 176"), out));
                blocks().for_each(|b| out.extend_from_slice(&b[..16]));
            }
            DType::Q6K => self.pack_q6_k(stored, out),
            DType::Q8_0 => self.pack_pairs(stored, out, |first, second, half, out| {
                for block in [first, second] {
                    match block {
                        Some(b) => out.extend_from_slice(&b[2 + half * HALF..][..HALF]),
                        None => out.extend_from_slice(&[0; HALF]),
                    }
                }
            }),
            DType::Q5_0 => {
                self.pack_pairs(stored, out, |first, second, half, out| {
                    let [first, second] = [first, second].map(|b| quants_q5_0(b, half));
                    out.extend((0..HALF).map(|j| (first[j] & 15) | (second[j] << 4)));
                });
                // The scales that `pack_pairs` ended with come after the fifth bits.
                let scales = out.split_off(out.len() - self.rows * self.row_blocks() * 2);
                self.each_pair(stored, |first, second| {
                    for half in 0..2 {
                        let [first, second] = [first, second].map(|b| quants_q5_0(b, half));
                        out.extend_from_slice(&fifth_bits(&first, &second));
                    }
                });
                out.extend_from_slice(&scales);
            }
            DType::F32 | DType::F16 | DType::Bf16 => {
                for row in 0..self.rows {
                    out.extend_from_slice(&stored[row * stored_row..][..stored_row]);
                    out.resize(start + (row + 1) * self.row_bytes(), 0);
                }
            }
        }
        out.resize(start + self.bytes(), 0);
    }

    fn pack_q6_k(&self, stored: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        let blocks = stored.len() / 210;
        out.resize(start + blocks * 192, 0);
        let (low, high) = out[start..].split_at_mut(blocks * 128);
        let planes = low
            .par_chunks_mut(128 * BLOCKS_A_TASK)
            .zip(high.par_chunks_mut(64 * BLOCKS_A_TASK))
            .zip(stored.par_chunks(210 * BLOCKS_A_TASK));
        planes.for_each(|((low, high), stored)| {
            let planes = low.chunks_exact_mut(128).zip(high.chunks_exact_mut(64));
            for (block, (low, high)) in stored.chunks_exact(210).zip(planes) {
                quants_q6_k(block, low, high);
            }
        });
        stored.chunks_exact(210).for_each(|b| out.extend_from_slice(&b[192..208]));
        stored.chunks_exact(210).for_each(|b| out.extend_from_slice(&b[208..]));
    }

    /// Both halves of each pair of blocks by `piece`, then the pairs' scales.
    fn pack_pairs(
        &self,
        stored: &[u8],
        out: &mut Vec<u8>,
        piece: impl Fn(Option<&[u8]>, Option<&[u8]>, usize, &mut Vec<u8>),
    ) {
        self.each_pair(stored, |first, second| {
            piece(first, second, 0, out);
            piece(first, second, 1, out);
        });
        self.each_pair(stored, |first, second| {
            for block in [first, second] {
                out.extend_from_slice(block.map_or(&[0, 0], |b| &b[..2]));
            }
        });
    }

    /// The blocks of 32 of each row, two at a time; absent past the row's end.
    fn each_pair(&self, stored: &[u8], mut pair: impl FnMut(Option<&[u8]>, Option<&[u8]>)) {
        for row in stored.chunks_exact(self.dtype.row_bytes(self.cols).max(1)) {
            let mut blocks = row.chunks_exact(self.dtype.block_bytes());
            while let Some(first) = blocks.next() {
                pair(Some(first), blocks.next());
            }
        }
    }
}

/// One block's nibbles and high bits as pieces; both begin as zeros.
fn quants_q6_k(block: &[u8], low: &mut [u8], high: &mut [u8]) {
    // Each half block: 128 weights, in four runs of 32 that share bytes.
    for n in 0..2 {
        let nibbles: &[u8; 64] = block[n * 64..][..64].try_into().expect("64 of 210");
        let pairs: &[u8; 32] = block[128 + n * 32..][..32].try_into().expect("32 of 210");
        // A chunk of 64 weights: runs 2 c and 2 c + 1.
        for c in 0..2 {
            let run = |r: usize, l: usize| match r {
                0 => (nibbles[l] & 15, pairs[l] & 3),
                1 => (nibbles[32 + l] & 15, (pairs[l] >> 2) & 3),
                2 => (nibbles[l] >> 4, (pairs[l] >> 4) & 3),
                _ => (nibbles[32 + l] >> 4, pairs[l] >> 6),
            };
            let piece = n * 4 + c * 2;
            for l in 0..32 {
                let (first, second) = (run(2 * c, l), run(2 * c + 1, l));
                low[piece * HALF + l] = first.0 | (second.0 << 4);
                let (half, k, b) = (l / HALF, (l % HALF) / 4, l % 4);
                let to = (piece + half) * 8 + b;
                high[to] |= first.1 << (2 * k);
                high[to + 4] |= second.1 << (2 * k);
            }
        }
    }
}

/// The 16 five-bit quants of one half of a Q5_0 block; zeros for none.
fn quants_q5_0(block: Option<&[u8]>, half: usize) -> [u8; HALF] {
    let Some(block) = block else { return [0; HALF] };
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    std::array::from_fn(|j| {
        let nibble = (block[6 + j] >> (4 * half)) & 15;
        nibble | (((fifth >> (HALF * half + j)) & 1) << 4) as u8
    })
}

/// A piece's fifth bits, from five-bit quants.
fn fifth_bits(first: &[u8; HALF], second: &[u8; HALF]) -> [u8; 4] {
    let mut bits = [0; 4];
    for j in 0..HALF {
        bits[j % 4] |= (first[j] >> 4) << (j / 4);
        bits[j % 4] |= (second[j] >> 4) << (j / 4 + 4);
    }
    bits
}

/// Q5_K keeps bit `2 c` of byte `l` for weight `64 c + l`, bit `2 c + 1` for weight `64 c + 32 + l`.
fn fifth_bits_k(stored: &[u8; 32], out: &mut Vec<u8>) {
    for c in 0..4 {
        for half in 0..2 {
            let bit = |shift: usize| -> [u8; HALF] {
                std::array::from_fn(|j| ((stored[half * HALF + j] >> (2 * c + shift)) & 1) << 4)
            };
            out.extend_from_slice(&fifth_bits(&bit(0), &bit(1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::Random;
    use crate::quant;

    /// A word of the planes that begin at `out`.
    fn word(out: &[u8], i: usize) -> u32 {
        u32::from_le_bytes(out[i * 4..][..4].try_into().unwrap())
    }

    /// What the kernels make of row `row`: quants by column, from the planes alone.
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

    /// The quants of a stored row, by the format's own description.
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
                let mut out = vec![9; 4];
                packed.pack(&stored, &mut out);
                assert_eq!(out.len(), 4 + packed.bytes());
                assert_eq!(packed.bytes() % 16, 0);
                for (row, stored) in stored.chunks_exact(dtype.row_bytes(cols)).enumerate() {
                    let got = quants(&packed, &out[4..], row);
                    assert_eq!(
                        got,
                        stored_quants(dtype, stored),
                        "{dtype} {rows}x{cols} row {row}"
                    );
                }
            }
        }
    }

    /// What the page's own repacking (web/src/engine/planes.ts) is held to, and this one with it:
    /// the BLAKE3 of the planes of bytes that xorshift (Marsaglia, 2003) makes of a seed.
    #[test]
    fn planes_are_those_that_the_page_is_held_to() {
        let listed = include_str!("../../../tests/data/tab/planes.json");
        let listed: Vec<(String, usize, usize, u32, String)> =
            serde_json::from_str(listed).unwrap();
        let formats: std::collections::HashSet<_> = listed.iter().map(|row| &row.0).collect();
        assert_eq!(formats.len(), DType::ALL.len());
        for (format, rows, cols, seed, hash) in &listed {
            let dtype =
                DType::ALL.into_iter().find(|d| super::super::pipelines::format_name(*d) == format);
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
            let mut out = Vec::new();
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
            let mut out = Vec::new();
            packed.pack(&stored, &mut out);
            for (row, stored) in stored.chunks_exact(dtype.row_bytes(33)).enumerate() {
                let got = &out[row * packed.row_bytes()..][..packed.row_bytes()];
                assert_eq!(&got[..stored.len()], stored);
                assert!(got[stored.len()..].iter().all(|b| *b == 0));
            }
        }
        // One block and its pair of zeros: the scale is the first half-word after the quants.
        let mut stored = Vec::new();
        quant::quantize(DType::Q8_0, &random.floats(32), &mut stored).unwrap();
        let mut out = Vec::new();
        Packed { dtype: DType::Q8_0, rows: 1, cols: 32 }.pack(&stored, &mut out);
        assert_eq!((&out[64..66], &out[66..68]), (&stored[..2], &[0, 0][..]));
    }
}
