//! How stored blocks become planes on a device, as data: which bits of a block move where.
//!
//! A stored row consists of blocks of odd sizes (Q6_K: 210 bytes). On the device a quantised matrix
//! consists of planes, one after the other, widest first, each read in aligned words. Their unit is
//! the piece: 32 weights that an invocation takes at once. Piece `2 g + h` of a row is the sixteen
//! weights from `64 g + 16 h` on and the sixteen from `64 g + 32 + 16 h` on. All formats divide
//! rows in the same way, so that one arrangement of the activations serves them all
//! (kernels/shared/pieces.wgsl). Blocks shorter than 64 weights are grouped to 64, and a row is
//! padded with blocks of zeros to whole groups. A plain format's group is 32 weights, in one plane.
//!
//! The usual planes, from which a format chooses:
//! - nibbles, 16 bytes per piece: byte `j` holds weight `j` of the first sixteen in its low half
//!   and weight `j` of the second sixteen in its high half;
//! - fifth bits, 4 bytes per piece: byte `b`, bit `k` belongs to weight `4 k + b` of the first
//!   sixteen, bit `k + 4` to that of the second;
//! - high pairs of bits, two words per piece, one for each sixteen: byte `b`, bits `2 k` and
//!   `2 k + 1` belong to weight `4 k + b`;
//! - bytes, 32 per piece: the first sixteen, then the second;
//! - scales and the like, as stored.
//!
//! A page repacks by the same data (web/src/engine/planes.ts). Shards are hashed in their stored
//! form; planes are never sent anywhere.

use std::sync::LazyLock;

use rayon::prelude::*;
use serde::Serialize;

use super::{Format, Visit, visit};
use doppler_store::DType;

/// Weights that kernels take at a time.
pub const UNIT: usize = 32;

/// Weights of half a piece. They share a scale in every format.
pub const HALF: usize = 16;

/// Groups of blocks that one task packs. They stay in a core's first-level cache during all moves.
const GROUPS_A_TASK: usize = 128;

/// Moves bits of neighbouring bytes together: takes the bits in `mask` of each of `bytes` bytes
/// from `from` on, shifts them to the left by `shift`, and puts them into the bytes from `to` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "(u16, u16, u16, u8, i8)")]
pub struct Move {
    /// Offset in the group's part of the plane.
    pub to: u16,
    /// Offset in the group's stored bytes.
    pub from: u16,
    pub bytes: u16,
    pub mask: u8,
    /// Negative to shift right. No bit leaves its byte.
    pub shift: i8,
}

impl From<Move> for (u16, u16, u16, u8, i8) {
    fn from(of: Move) -> Self {
        (of.to, of.from, of.bytes, of.mask, of.shift)
    }
}

/// One plane: what it holds of each group of blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plane {
    /// Bytes per group.
    pub bytes: usize,
    pub moves: Vec<Move>,
}

/// A format's planes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Planes {
    /// Weights and stored bytes of a block.
    pub block_len: usize,
    pub block_bytes: usize,
    /// Blocks per group.
    pub together: usize,
    /// In the order in which they are stored.
    pub planes: Vec<Plane>,
}

/// The planes of a format.
pub fn of(dtype: DType) -> &'static Planes {
    struct Of;
    impl Visit for Of {
        type Output = Planes;
        fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) -> Planes {
            let together = if LEN == 1 { UNIT } else { (2 * UNIT / LEN).max(1) };
            Planes { block_len: LEN, block_bytes: BYTES, together, planes: F::planes() }
        }
    }
    static ALL: LazyLock<Vec<Planes>> =
        LazyLock::new(|| DType::ALL.into_iter().map(|dtype| visit(dtype, Of)).collect());
    &ALL[dtype as usize]
}

impl Planes {
    /// Stored bytes of a group.
    pub const fn stored_bytes(&self) -> usize {
        self.together * self.block_bytes
    }

    /// Bytes of a group in all planes together.
    pub fn bytes(&self) -> usize {
        self.planes.iter().map(|plane| plane.bytes).sum()
    }

    /// Groups of a row.
    pub const fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.together * self.block_len)
    }

    /// Writes the planes of `stored` (whole rows of `cols` weights) to the start of `out`, and
    /// zeros after them.
    pub fn pack(&self, cols: usize, stored: &[u8], out: &mut [u8]) {
        let row = cols.div_ceil(self.block_len) * self.block_bytes;
        let wide = self.groups(cols) * self.stored_bytes();
        if wide == row || row == 0 {
            return self.pack_groups(stored, out);
        }
        // Rows that end within a group are padded with blocks of zeros.
        let mut padded = vec![0; stored.len() / row * wide];
        for (padded, stored) in padded.chunks_exact_mut(wide).zip(stored.chunks_exact(row)) {
            padded[..row].copy_from_slice(stored);
        }
        self.pack_groups(&padded, out);
    }

    fn pack_groups(&self, stored: &[u8], out: &mut [u8]) {
        let whole = self.stored_bytes();
        let groups = stored.len() / whole;
        let mut rest = out;
        for plane in &self.planes {
            let (mine, others) = rest.split_at_mut(groups * plane.bytes);
            rest = others;
            if groups <= GROUPS_A_TASK {
                plane.pack(stored, whole, mine);
            } else {
                mine.par_chunks_mut(GROUPS_A_TASK * plane.bytes)
                    .zip(stored.par_chunks(GROUPS_A_TASK * whole))
                    .for_each(|(mine, stored)| plane.pack(stored, whole, mine));
            }
        }
        rest.fill(0);
    }
}

impl Plane {
    /// Packs groups of `whole` stored bytes each. Some move writes each bit of `out`, so the first
    /// move into a byte can ignore what was there.
    fn pack(&self, stored: &[u8], whole: usize, out: &mut [u8]) {
        if let [of] = self.moves[..]
            && usize::from(of.bytes) == whole
        {
            return out.copy_from_slice(stored);
        }
        let mut touched = vec![false; self.bytes];
        for of in &self.moves {
            let (to, from) = (usize::from(of.to), usize::from(of.from));
            let bytes = usize::from(of.bytes);
            let adds = touched[to];
            touched[to..to + bytes].fill(true);
            let mut run = Run { stored, whole, out: &mut *out, bytes: self.bytes };
            if of.mask == 0xff {
                run.copy(from, to, bytes);
                continue;
            }
            let mut at = 0;
            while at + 8 <= bytes {
                run.bits::<8>(from + at, to + at, of, adds);
                at += 8;
            }
            while at + 4 <= bytes {
                run.bits::<4>(from + at, to + at, of, adds);
                at += 4;
            }
            while at < bytes {
                run.bits::<1>(from + at, to + at, of, adds);
                at += 1;
            }
        }
    }
}

/// Consecutive groups, and their parts of a plane.
struct Run<'a> {
    stored: &'a [u8],
    /// Stored bytes of a group.
    whole: usize,
    out: &'a mut [u8],
    /// Bytes of a group's part.
    bytes: usize,
}

impl Run<'_> {
    fn copy(&mut self, from: usize, to: usize, bytes: usize) {
        match bytes {
            2 => self.copy_all::<2>(from, to),
            4 => self.copy_all::<4>(from, to),
            HALF => self.copy_all::<HALF>(from, to),
            _ => {
                let groups = self.stored.chunks_exact(self.whole);
                for (stored, out) in groups.zip(self.out.chunks_exact_mut(self.bytes)) {
                    out[to..][..bytes].copy_from_slice(&stored[from..][..bytes]);
                }
            }
        }
    }

    fn copy_all<const N: usize>(&mut self, from: usize, to: usize) {
        let groups = self.stored.chunks_exact(self.whole);
        for (stored, out) in groups.zip(self.out.chunks_exact_mut(self.bytes)) {
            out[to..][..N].copy_from_slice(&stored[from..][..N]);
        }
    }

    /// `N` neighbouring bytes of every group.
    fn bits<const N: usize>(&mut self, from: usize, to: usize, of: &Move, adds: bool) {
        let left = u32::from(of.shift.max(0).unsigned_abs());
        let right = u32::from(of.shift.min(0).unsigned_abs());
        let mask = u64::from(of.mask) * 0x0101_0101_0101_0101;
        let groups = self.stored.chunks_exact(self.whole);
        for (stored, out) in groups.zip(self.out.chunks_exact_mut(self.bytes)) {
            let (mut bits, mut there) = ([0; 8], [0; 8]);
            bits[..N].copy_from_slice(&stored[from..][..N]);
            let moved = (u64::from_le_bytes(bits) & mask) << left >> right;
            let out = &mut out[to..][..N];
            if adds {
                there[..N].copy_from_slice(out);
            }
            let moved = moved | u64::from_le_bytes(there);
            out.copy_from_slice(&moved.to_le_bytes()[..N]);
        }
    }
}

/// A run of bytes, unchanged.
pub fn copy(from: usize, bytes: usize) -> Plane {
    Plane { bytes, moves: vec![take(0, from, bytes)] }
}

/// The same run of bytes from each of a pair of blocks.
pub fn copy_pair(block_bytes: usize, from: usize, bytes: usize) -> Plane {
    let moves = vec![take(0, from, bytes), take(bytes, block_bytes + from, bytes)];
    Plane { bytes: 2 * bytes, moves }
}

/// Nibbles of a pair of blocks of 32. In each block the 16 bytes from `from` on hold weights 0..16
/// in their low halves and 16..32 in their high halves.
pub fn nibbles_pair(block_bytes: usize, from: usize) -> Plane {
    let moves = [0, 1].into_iter().flat_map(|half| {
        [0, 1].map(|second| Move {
            to: word(HALF * half),
            from: word(second * block_bytes + from),
            bytes: word(HALF),
            mask: 15 << (4 * half),
            shift: 4 * second as i8 - 4 * half as i8,
        })
    });
    Plane { bytes: 2 * HALF, moves: moves.collect() }
}

/// Fifth bits of a pair of blocks of 32. In each block they are a word at `from`, one bit per
/// weight.
pub fn fifths_pair(block_bytes: usize, from: usize) -> Plane {
    let mut moves = Vec::new();
    for (half, second) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        for weight in 0..HALF {
            let bit = HALF * half + weight;
            let (k, b) = (weight / 4, weight % 4);
            moves.push(Move {
                to: word(4 * half + b),
                from: word(second * block_bytes + from + bit / 8),
                bytes: 1,
                mask: 1 << (bit % 8),
                shift: (k + 4 * second) as i8 - (bit % 8) as i8,
            });
        }
    }
    Plane { bytes: 8, moves }
}

/// Bytes of a pair of blocks of 32.
pub fn bytes_pair(block_bytes: usize, from: usize) -> Plane {
    let moves = [0, 1].into_iter().flat_map(|half| {
        [0, 1].map(|second| {
            take(32 * half + HALF * second, second * block_bytes + from + HALF * half, HALF)
        })
    });
    Plane { bytes: 64, moves: moves.collect() }
}

/// A move of whole bytes.
pub fn take(to: usize, from: usize, bytes: usize) -> Move {
    Move { to: word(to), from: word(from), bytes: word(bytes), mask: 0xff, shift: 0 }
}

/// An offset within a group.
pub fn word(n: usize) -> u16 {
    u16::try_from(n).expect("a group of blocks is far smaller")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Planes contain each stored bit exactly once.
    #[test]
    fn every_bit_of_a_block_has_one_place() {
        for dtype in DType::ALL {
            let planes = of(dtype);
            assert_eq!(planes.block_len, dtype.block_len());
            let mut taken = vec![0_u8; planes.stored_bytes()];
            for (n, plane) in planes.planes.iter().enumerate() {
                let mut given = vec![0_u8; plane.bytes];
                for of in &plane.moves {
                    let moved = i32::from(of.mask) << 8 >> (8 - i32::from(of.shift));
                    assert!(
                        (1..256).contains(&moved),
                        "{dtype}, plane {n}: a bit of {of:?} leaves its byte"
                    );
                    assert_eq!(moved.count_ones(), of.mask.count_ones(), "{dtype}: {of:?}");
                    let (to, bytes) = (usize::from(of.to), usize::from(of.bytes));
                    let touched = given[to..to + bytes].iter().filter(|bits| **bits != 0).count();
                    assert!(
                        [0, bytes].contains(&touched),
                        "{dtype}: {of:?} is the first into only some of its bytes"
                    );
                    for i in 0..bytes {
                        let (from, to) = (usize::from(of.from) + i, usize::from(of.to) + i);
                        assert_eq!(taken[from] & of.mask, 0, "{dtype}: byte {from} is taken twice");
                        assert_eq!(given[to] & moved as u8, 0, "{dtype}: byte {to} of plane {n}");
                        taken[from] |= of.mask;
                        given[to] |= moved as u8;
                    }
                }
                assert!(given.iter().all(|bits| *bits == 0xff), "{dtype}: plane {n} has gaps");
            }
            assert!(taken.iter().all(|bits| *bits == 0xff), "{dtype}: bits are lost");
        }
    }

    /// Compares with moving bit by bit, including rows that end within a group.
    #[test]
    fn packing_does_what_the_moves_say() {
        use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for dtype in DType::ALL {
            let planes = of(dtype);
            for (rows, blocks) in [(1, 1), (3, 5), (rng.random_range(2..400), 4)] {
                let cols = blocks * planes.block_len;
                let mut stored = vec![0; rows * blocks * planes.block_bytes];
                rng.fill_bytes(&mut stored);
                let total = rows * planes.groups(cols);
                let mut out = vec![9; total * planes.bytes()];
                planes.pack(cols, &stored, &mut out);
                let mut want = vec![0_u8; out.len()];
                let mut begin = 0;
                for plane in &planes.planes {
                    for group in 0..total {
                        let (row, at) = (group / planes.groups(cols), group % planes.groups(cols));
                        let row = &stored[row * blocks * planes.block_bytes..];
                        let row = &row[..blocks * planes.block_bytes];
                        for of in &plane.moves {
                            for i in 0..usize::from(of.bytes) {
                                let from = at * planes.stored_bytes() + usize::from(of.from) + i;
                                let byte = row.get(from).map_or(0, |byte| byte & of.mask);
                                let byte = i32::from(byte) << 8 >> (8 - i32::from(of.shift));
                                want[begin + group * plane.bytes + usize::from(of.to) + i] |=
                                    byte as u8;
                            }
                        }
                    }
                    begin += total * plane.bytes;
                }
                assert_eq!(out, want, "{dtype}: {rows} rows of {blocks} blocks");
            }
        }
    }
}
