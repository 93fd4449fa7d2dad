//! A bitmap of the 16 KiB groups of an object that are held, and its file format.
//!
//! A file is `DNHAVE1\n`, the size (u64, little-endian), one bit per group (least
//! significant bit first), and the first 16 bytes of the BLAKE3 hash of the
//! object's id followed by everything before. A file whose hash does not match
//! is ignored.

use super::verified::{GROUP_BYTES, OBJECT_BYTES_MAX};
use super::{ByteRange, ShardId};

/// Bytes of a chunk, the unit in which peers announce objects held in part.
pub const CHUNK_BYTES: u64 = 1024 * 1024;

/// [`Chunks`] has one bit per chunk.
const _: () = assert!(OBJECT_BYTES_MAX.div_ceil(CHUNK_BYTES) <= u64::BITS as u64);

/// Which 1 MiB chunks of an object are held: bit i is chunk i. Bits past the
/// object's end mean nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chunks(pub u64);

impl Chunks {
    pub const NONE: Self = Self(0);
    /// A whole object.
    pub const ALL: Self = Self(u64::MAX);

    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The first contiguous part of `range` that lies within these chunks.
    pub fn first(self, range: ByteRange) -> Option<ByteRange> {
        let held = |at: u64| {
            let chunk = at / CHUNK_BYTES;
            chunk < u64::from(u64::BITS) && self.0 >> chunk & 1 == 1
        };
        let next = |at: u64| (at / CHUNK_BYTES + 1).saturating_mul(CHUNK_BYTES).min(range.end());
        let past = |at: u64| at / CHUNK_BYTES >= u64::from(u64::BITS);
        let mut start = range.start();
        while start < range.end() && !held(start) && !past(start) {
            start = next(start);
        }
        let mut end = start;
        while end < range.end() && held(end) {
            end = next(end);
        }
        ByteRange::new(start, end)
    }

    /// Whether all of `range` lies within these chunks.
    pub fn cover(self, range: ByteRange) -> bool {
        self.first(range) == Some(range)
    }
}

const MAGIC: &[u8; 8] = b"DNHAVE1\n";
const HEADER_BYTES: usize = 16;
const CHECK_BYTES: usize = 16;

/// Which groups of an object of `size` bytes are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    size: u64,
    bits: Vec<u8>,
    held: u64,
}

impl Groups {
    /// None held. `size` is at most [`OBJECT_BYTES_MAX`].
    pub fn none(size: u64) -> Self {
        debug_assert!(size <= OBJECT_BYTES_MAX);
        let groups = size.min(OBJECT_BYTES_MAX).div_ceil(GROUP_BYTES);
        Self { size, bits: vec![0; groups.div_ceil(8) as usize], held: 0 }
    }

    /// All held.
    pub fn all(size: u64) -> Self {
        let mut all = Self::none(size);
        if let Some(whole) = ByteRange::new(0, size) {
            all.set(whole);
        }
        all
    }

    /// The object's size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in the held groups.
    pub const fn held_bytes(&self) -> u64 {
        self.held
    }

    pub const fn is_whole(&self) -> bool {
        self.held == self.size
    }

    /// Whether the last group is held, which proves the size.
    pub fn proves_size(&self) -> bool {
        self.size == 0 || self.has((self.size - 1) / GROUP_BYTES)
    }

    /// Marks the groups that lie entirely within `range` as held.
    pub fn set(&mut self, range: ByteRange) {
        let end = if range.end() >= self.size {
            self.size.div_ceil(GROUP_BYTES)
        } else {
            range.end() / GROUP_BYTES
        };
        for group in range.start().div_ceil(GROUP_BYTES)..end {
            if !self.has(group) {
                self.bits[(group / 8) as usize] |= 1 << (group % 8);
                self.held += self.group_bytes(group);
            }
        }
    }

    /// Whether every group that `range` touches is held.
    pub fn holds(&self, range: ByteRange) -> bool {
        range.end() <= self.size
            && (range.start() / GROUP_BYTES..range.end().div_ceil(GROUP_BYTES))
                .all(|group| self.has(group))
    }

    /// The chunks whose groups are all held.
    pub fn chunks(&self) -> Chunks {
        let mut chunks = Chunks::NONE;
        for chunk in 0..self.size.div_ceil(CHUNK_BYTES) {
            let start = chunk * CHUNK_BYTES;
            let range = ByteRange::new(start, (start + CHUNK_BYTES).min(self.size));
            if range.is_some_and(|range| self.holds(range)) {
                chunks.0 |= 1 << chunk;
            }
        }
        chunks
    }

    /// Extends `range` to whole groups and cuts it into runs that are entirely held
    /// (true) or entirely missing (false), in order. Each run has at most `longest`
    /// bytes, a multiple of the group size.
    pub fn runs(&self, range: ByteRange, longest: u64) -> Vec<(ByteRange, bool)> {
        let mut runs: Vec<(ByteRange, bool)> = Vec::new();
        for group in range.start() / GROUP_BYTES..range.end().div_ceil(GROUP_BYTES) {
            let held = self.has(group);
            let start = group * GROUP_BYTES;
            let end = (start + GROUP_BYTES).min(self.size.max(start + 1));
            match runs.last_mut() {
                Some((last, same)) if *same == held && end - last.start() <= longest => {
                    *last = ByteRange::new(last.start(), end).unwrap_or(*last);
                }
                _ => runs.extend(ByteRange::new(start, end).map(|range| (range, held))),
            }
        }
        runs
    }

    /// The groups held here but not in `others`, as the fewest ranges, in order.
    pub fn without(&self, others: &Self) -> Vec<ByteRange> {
        let mut ranges: Vec<ByteRange> = Vec::new();
        for group in 0..self.size.div_ceil(GROUP_BYTES) {
            if !self.has(group) || others.has(group) {
                continue;
            }
            let start = group * GROUP_BYTES;
            let end = start + self.group_bytes(group);
            match ranges.last_mut() {
                Some(last) if last.end() == start => {
                    *last = ByteRange::new(last.start(), end).unwrap_or(*last);
                }
                _ => ranges.extend(ByteRange::new(start, end)),
            }
        }
        ranges
    }

    /// The contents of the have-file; `shard` binds them to the object.
    pub fn to_file(&self, shard: ShardId) -> Vec<u8> {
        let mut file = Vec::with_capacity(HEADER_BYTES + self.bits.len() + CHECK_BYTES);
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&self.size.to_le_bytes());
        file.extend_from_slice(&self.bits);
        let check = checksum(shard, &file);
        file.extend_from_slice(&check);
        file
    }

    /// Parses a have-file. `None` if it is damaged or belongs to another object.
    pub fn from_file(shard: ShardId, file: &[u8]) -> Option<Self> {
        let (content, check) = file.split_at_checked(file.len().checked_sub(CHECK_BYTES)?)?;
        if checksum(shard, content) != check || content.get(..8)? != MAGIC {
            return None;
        }
        let size = u64::from_le_bytes(content.get(8..HEADER_BYTES)?.try_into().ok()?);
        if size > OBJECT_BYTES_MAX {
            return None;
        }
        let mut groups = Self::none(size);
        let bits = &content[HEADER_BYTES..];
        if bits.len() != groups.bits.len() {
            return None;
        }
        for group in 0..size.div_ceil(GROUP_BYTES) {
            if bits[(group / 8) as usize] >> (group % 8) & 1 == 1 {
                groups.bits[(group / 8) as usize] |= 1 << (group % 8);
                groups.held += groups.group_bytes(group);
            }
        }
        Some(groups)
    }

    fn has(&self, group: u64) -> bool {
        self.bits.get((group / 8) as usize).is_some_and(|byte| byte >> (group % 8) & 1 == 1)
    }

    fn group_bytes(&self, group: u64) -> u64 {
        (self.size - group * GROUP_BYTES).min(GROUP_BYTES)
    }
}

fn checksum(shard: ShardId, content: &[u8]) -> [u8; CHECK_BYTES] {
    let hash = blake3::Hasher::new().update(shard.as_bytes()).update(content).finalize();
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&hash.as_bytes()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = GROUP_BYTES;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn groups_add_up_to_the_whole() {
        let size = 11 * G + 5;
        let mut groups = Groups::none(size);
        groups.set(range(2 * G, 4 * G));
        assert!(groups.holds(range(2 * G + 1, 4 * G)) && !groups.holds(range(2 * G, 4 * G + 1)));
        groups.set(range(4 * G + 1, 5 * G));
        assert_eq!(groups.held_bytes(), 2 * G, "half a group is not held");
        groups.set(range(11 * G, size));
        assert_eq!(groups.held_bytes(), 2 * G + 5);
        assert!(groups.proves_size() && !groups.is_whole());
        assert!(!groups.holds(range(11 * G, size + 1)), "past the end");
        groups.set(range(0, size));
        assert_eq!(groups, Groups::all(size));
        assert!(groups.is_whole());
        assert!(Groups::all(0).is_whole() && Groups::none(0).proves_size());
    }

    #[test]
    fn the_difference_of_two_sets_is_given_in_the_fewest_ranges() {
        let size = 9 * G + 1;
        let mut sound = Groups::all(size);
        assert_eq!(sound.without(&Groups::all(size)), []);
        assert_eq!(sound.without(&Groups::none(size)), [range(0, size)]);
        sound = Groups::none(size);
        sound.set(range(2 * G, 5 * G));
        sound.set(range(6 * G, 9 * G));
        let lost = Groups::all(size).without(&sound);
        assert_eq!(lost, [range(0, 2 * G), range(5 * G, 6 * G), range(9 * G, size)]);
        assert_eq!(Groups::none(size).without(&sound), []);
    }

    #[test]
    fn chunks_are_those_held_whole() {
        let size = 3 * CHUNK_BYTES + 5;
        let mut groups = Groups::none(size);
        assert!(groups.chunks().is_none());
        groups.set(range(CHUNK_BYTES, 2 * CHUNK_BYTES));
        groups.set(range(2 * CHUNK_BYTES, 3 * CHUNK_BYTES - G));
        assert_eq!(groups.chunks(), Chunks(0b10));
        groups.set(range(3 * CHUNK_BYTES, size));
        assert_eq!(groups.chunks(), Chunks(0b1010), "the last one is short");
        assert_eq!(Groups::all(OBJECT_BYTES_MAX).chunks(), Chunks::ALL);
        let some = Chunks(0b1011);
        assert_eq!(some.first(range(5, size)), Some(range(5, 2 * CHUNK_BYTES)));
        let after_hole = range(3 * CHUNK_BYTES, size);
        assert_eq!(some.first(range(2 * CHUNK_BYTES + 9, size)), Some(after_hole));
        assert_eq!(some.first(range(2 * CHUNK_BYTES, 3 * CHUNK_BYTES)), None);
        assert!(some.cover(range(7, 8)) && !some.cover(range(0, size)));
        let far = range(OBJECT_BYTES_MAX - 1, OBJECT_BYTES_MAX + 9);
        assert_eq!(Chunks::ALL.first(far), Some(range(OBJECT_BYTES_MAX - 1, OBJECT_BYTES_MAX)));
        assert_eq!(Chunks::ALL.first(range(OBJECT_BYTES_MAX, u64::MAX)), None);
    }

    #[test]
    fn runs_cover_the_range_in_order() {
        let size = 9 * G + 1;
        let mut groups = Groups::none(size);
        groups.set(range(2 * G, 5 * G));
        let cut = groups.runs(range(G + 3, size), 2 * G);
        let expected = [
            (range(G, 2 * G), false),
            (range(2 * G, 4 * G), true),
            (range(4 * G, 5 * G), true),
            (range(5 * G, 7 * G), false),
            (range(7 * G, 9 * G), false),
            (range(9 * G, size), false),
        ];
        assert_eq!(cut, expected);
    }

    #[test]
    fn a_have_file_round_trips_and_any_damage_invalidates_it() {
        let shard = ShardId::of(b"object");
        let mut groups = Groups::none(20 * G + 1);
        groups.set(range(3 * G, 9 * G));
        let file = groups.to_file(shard);
        assert_eq!(Groups::from_file(shard, &file), Some(groups));
        assert_eq!(Groups::from_file(ShardId::of(b"other"), &file), None);
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            assert_eq!(Groups::from_file(shard, &bad), None, "byte {at}");
            assert_eq!(Groups::from_file(shard, &file[..at]), None, "cut at {at}");
        }
    }
}
