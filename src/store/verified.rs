//! Ranges of an object that carry their own proof: the bao encoding over
//! 16 KiB groups, made by a holder and checked by whoever receives it.
//!
//! Invariant: a [`VerifiedRange`] exists only if its bytes were checked against
//! the object's BLAKE3 root, group by group.

use bytes::Bytes;

use super::{ByteRange, ShardId};

/// Bytes of a hash-tree group: the unit of proof.
pub const GROUP_BYTES: u64 = 16 * 1024;

/// The most bytes of an object one call of `ShardServe::encode` or one wire request carries.
pub const SERVE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The largest object: RDRR's shard size.
pub const OBJECT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A bao response: parents and leaves in pre-order, without the size prefix.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The whole object's size in bytes.
    pub size: u64,
    pub bytes: Bytes,
}

/// Proved bytes of one object and the hash-tree nodes on their path to the root.
#[derive(Debug, Clone)]
pub struct VerifiedRange {
    shard: ShardId,
    size: u64,
    range: ByteRange,
    bytes: Bytes,
}

impl VerifiedRange {
    pub const fn shard(&self) -> ShardId {
        self.shard
    }

    /// The whole object's size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// What is covered: whole groups, the last one possibly short.
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// The bytes of `range()`.
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}
