//! The content-addressed weight store: ids, the RDRR manifest, verified
//! ranges, and the tiers that serve them.
//!
//! It depends on no other room and knows no GPU, no network and no wall clock.
//! Invariant: every byte that a tier returns was verified against its BLAKE3
//! root when it entered.

pub mod chat;
pub mod dir;
pub mod disk;
pub mod dtype;
mod error;
mod files;
mod flights;
mod formats;
pub mod groups;
mod index;
pub mod ladder;
pub mod lfu;
pub mod manifest;
mod manifest_check;
mod manifest_read;
#[cfg(test)]
mod manifest_tests;
mod manifest_write;
mod object;
mod pins;
pub mod policy;
mod policy_kind;
pub mod ram;
pub mod regular;
mod repair;
mod replicas;
mod reserve;
pub mod segmented;
pub mod signature;
pub mod slru;
pub mod tier;
pub mod verified;

pub use dir::{DirReader, DirShard, MemReader};
pub use disk::{Checkup, Collected, DiskOptions, DiskStats, DiskTier, Imported, ObjectInfo};
pub use doppler_ids::{BadHash, ByteRange, ModelId, ShardId};
pub use dtype::DType;
pub use error::{Lack, StoreError};
pub use ladder::{Ladder, LadderOptions, LadderStats, TierStats};
pub use manifest::{Manifest, ManifestError};
pub use policy_kind::{PolicyKind, UnknownPolicy};
pub use replicas::{BadReplicas, REPLICAS_MAX, Replicas};
pub use tier::{
    Found, Priority, RangeReader, ReadError, ReadRequest, Served, ShardServe, ShardSource, Tier,
};
