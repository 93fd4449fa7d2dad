//! The names that everything else speaks in: peers, their addresses, shards, models, byte ranges.
//!
//! Plain values: no sockets, no runtime, no libp2p. Their text and binary forms are those of
//! libp2p's peer ids and multiaddrs, so `doppler_swarm` converts them at its edge.
//! Invariant: a value that exists is well formed; no input panics.

mod address;
mod hash;
mod multiaddr;
mod peer;
mod range;

pub use address::{Address, BadAddress, Carrier};
pub use hash::{BadHash, ModelId, ShardId};
pub use peer::{BadPeerId, PEER_BYTES_MAX, PeerId};
pub use range::ByteRange;
