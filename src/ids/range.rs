//! Byte ranges within one object.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A half-open, never empty range of bytes `start..end` within one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// `None` if the range would be empty or reversed.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end { Some(Self { start, end }) } else { None }
    }

    /// `len` bytes from `start`; `None` if empty or past `u64::MAX`.
    pub const fn at(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Self::new(start, end),
            None => None,
        }
    }

    pub const fn start(&self) -> u64 {
        self.start
    }

    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Bytes in the range, at least 1.
    #[allow(clippy::len_without_is_empty)] // never empty by construction
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_never_empty_or_reversed() {
        assert_eq!(ByteRange::new(4, 4), None);
        assert_eq!(ByteRange::new(5, 4), None);
        assert_eq!(ByteRange::at(u64::MAX, 1), None);
        let whole = ByteRange::new(0, 10).unwrap();
        let tail = ByteRange::at(8, 2).unwrap();
        assert!(whole.contains(&tail) && !tail.contains(&whole));
        assert!(whole.overlaps(&tail) && !tail.overlaps(&ByteRange::new(0, 8).unwrap()));
    }
}
