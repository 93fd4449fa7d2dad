//! The interfaces between tiers: read requests, their results and errors, and the
//! traits through which the ladder, the mesh and the engine meet.

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::Serialize;

use super::groups::Chunks;
use super::verified::{Encoded, VerifiedRange};
use super::{ByteRange, ShardId};

/// Where bytes were found, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Vram,
    Ram,
    Disk,
    Peer,
}

/// Who waits for a read. Sources serve competing reads in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A token waits for it.
    Token,
    /// It will probably be needed soon.
    Prefetch,
    /// Nobody waits for it: replication, import, repair.
    Bulk,
}

/// One read of one range of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadRequest {
    pub shard: ShardId,
    pub range: ByteRange,
    pub priority: Priority,
    /// When the caller stops waiting. With `None` the source's own time-out applies.
    pub deadline: Option<Instant>,
}

impl ReadRequest {
    /// A read that a token waits for, without a deadline.
    pub const fn token(shard: ShardId, range: ByteRange) -> Self {
        Self { shard, range, priority: Priority::Token, deadline: None }
    }
}

/// Verified bytes of exactly the range asked for, and the tier that had them.
#[derive(Debug, Clone)]
pub struct Found {
    pub bytes: Bytes,
    pub tier: Tier,
}

/// Why a read failed, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No tier and no peer has it. `waited` is how long the node looked for a provider.
    #[error("shard {shard}: nobody has it (looked for {:.1} s)", waited.as_secs_f64())]
    NotFound { shard: ShardId, waited: Duration },
    /// The bytes do not match their hash, and no other source is left.
    #[error("shard {shard}: its bytes do not match its hash ({detail})")]
    Corrupt { shard: ShardId, detail: String },
    /// A provider is known, but the bytes did not arrive in time.
    #[error("shard {shard}: not fetched within {:.1} s ({detail})", waited.as_secs_f64())]
    Deadline { shard: ShardId, waited: Duration, detail: String },
    /// A bounded queue is full; try again later.
    #[error("overloaded: {0}")]
    Overloaded(String),
    /// The other side or a budget does not allow it.
    #[error("refused: {0}")]
    Refused(String),
    /// The range lies outside the object.
    #[error("shard {shard}: range {range} is outside its {size} bytes")]
    OutOfRange { shard: ShardId, range: ByteRange, size: u64 },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl ReadError {
    /// A stable name for metrics and JSON.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Corrupt { .. } => "corrupt",
            Self::Deadline { .. } => "deadline",
            Self::Overloaded(_) => "overloaded",
            Self::Refused(_) => "refused",
            Self::OutOfRange { .. } => "out_of_range",
            Self::Io { .. } => "io",
        }
    }
}

/// A source that can be read by content address: the ladder, a directory, memory.
///
/// The futures must be polled within a tokio runtime.
pub trait RangeReader: Send + Sync {
    /// Reads exactly `request.range`. The bytes returned are verified.
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, Result<Found, ReadError>>;
}

/// The tier below the disk: peers. Implemented by the mesh.
pub trait ShardSource: Send + Sync {
    /// Fetches at least `request.range`, extended to whole 16 KiB groups, with the
    /// hash-tree nodes that prove it, so that the caller can store and serve it.
    fn fetch(&self, request: ReadRequest) -> BoxFuture<'_, Result<VerifiedRange, ReadError>>;
}

/// A range for a peer.
pub enum Served {
    /// Already encoded.
    Encoded(Encoded),
    /// To be encoded while it is sent.
    Proved(VerifiedRange),
}

impl Served {
    /// The size of the whole object.
    pub const fn object_size(&self) -> u64 {
        match self {
            Self::Encoded(encoded) => encoded.size,
            Self::Proved(range) => range.size(),
        }
    }
}

/// What a node offers its peers. Implemented by the ladder, called by the mesh.
pub trait ShardServe: Send + Sync {
    /// The object's total size and the bao encoding of `range`, extended to whole
    /// 16 KiB groups, from what is held locally, never from peers. `NotFound` if any
    /// of it is missing; `Refused` above [`super::verified::SERVE_BYTES_MAX`] bytes.
    fn encode(&self, shard: ShardId, range: ByteRange)
    -> BoxFuture<'_, Result<Encoded, ReadError>>;

    /// As [`Self::encode`], but may leave the encoding to the sender to save a copy.
    fn serve(&self, shard: ShardId, range: ByteRange) -> BoxFuture<'_, Result<Served, ReadError>> {
        let encoded = self.encode(shard, range);
        Box::pin(async move { Ok(Served::Encoded(encoded.await?)) })
    }

    /// Ids of the objects held whole, in no particular order.
    fn complete(&self) -> Vec<ShardId>;

    /// At most `max` objects that are held in part, with the 1 MiB chunks that are held.
    fn partial(&self, max: usize) -> Vec<(ShardId, Chunks)> {
        let _ = max;
        Vec::new()
    }

    /// Changes whenever `complete` may have changed.
    fn changes(&self) -> tokio::sync::watch::Receiver<u64>;
}
