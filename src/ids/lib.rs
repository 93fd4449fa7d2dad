//! The identifiers that all rooms share: peers, their addresses, shards, models, byte ranges.
//!
//! They are plain values: no sockets, no runtime, no libp2p. Peer ids and addresses have the text
//! and binary forms of libp2p's, so `doppler_swarm` converts them at its edge. Invariant: every
//! value is well formed, and no input causes a panic.

mod address;
mod hash;
mod multiaddr;
mod peer;
mod range;

pub use address::{Address, BadAddress, Transport};
pub use hash::{BadHash, ModelId, ShardId};
pub use peer::{BadPeerId, PEER_BYTES_MAX, PeerId};
pub use range::ByteRange;
