//! The content-addressed weight store: ids, the RDRR manifest, verified
//! ranges and the tiers they are read through.
//!
//! Knows `wire` only: never wgpu, never libp2p, never a wall clock. Every byte
//! that leaves a tier here was proved against its BLAKE3 root where it entered.

pub mod dtype;
pub mod ids;
pub mod manifest;
mod manifest_check;
mod manifest_read;
#[cfg(test)]
mod manifest_tests;
mod manifest_write;
pub mod policy;
pub mod tier;
pub mod verified;

pub use dtype::DType;
pub use ids::{ByteRange, ModelId, ShardId};
pub use manifest::{Manifest, ManifestError};
pub use tier::{
    Found, Priority, RangeReader, ReadError, ReadRequest, ShardServe, ShardSource, Tier,
};
