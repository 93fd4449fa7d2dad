//! The mesh: who is there, who holds what, and bytes that prove themselves.
//!
//! Knows the store's vocabulary and `wire`; libp2p stays behind `doppler_swarm`.
//! Owns peers' holdings, reputations and the two sides of the shard protocol.
//! Refuses: to believe anybody. An announcement counts only under its
//! publisher's signature, a holding only from the one who holds it and only for
//! its lease, a byte only once it matched its hash.
//!
//! Who decides: `membership`, `announcements`, `reputation`, `scheduler` with
//! `links` and `gossip` are pure; `state` puts them behind one lock; `actor` (gossip),
//! `fetch` with `shard_client` (reads) and `shard_server` (serving) do the I/O.

mod actor;
mod announcements;
mod fetch;
mod gossip;
mod handle;
mod limiter;
mod links;
mod membership;
mod options;
mod reputation;
mod scheduler;
mod shard_client;
mod shard_server;
mod state;
pub mod wire;

pub use doppler_swarm::{
    Address, BadAddress, BadPeerId, Carrier, Path, PeerId, Reach, RelayMode, SwarmError, SwarmKey,
    Verdict, certificates, check_certificate, generate_certificate, install_crypto,
};
pub use handle::{KnownModel, Mesh, MeshHandle, PeerInfo, Stats, topic};
pub use options::{
    FIND_TIMEOUT, LIMIT_MIN, MeshError, MeshOptions, PROTOCOL_VERSION, SHARD_PROTOCOL,
    SWARM_NAME_BYTES_MAX, Timing, UPLOAD_SLOTS,
};
pub use state::{Counts, Load, Traffic};
