//! The mesh: who is there, who holds what, and bytes that prove themselves.
//!
//! Knows the store's vocabulary and `wire`; libp2p stays behind `doppler_swarm`. Owns peers'
//! holdings, reputations and both sides of the shard protocol. Trusts nobody: an announcement
//! counts only with its publisher's signature, a holding only if its holder says so and only for
//! its lease, and a byte only once it matches its hash.
//!
//! `core` decides, but performs nothing; `shared` puts it behind one lock and performs its actions;
//! `actor` (gossip), `fetch` with `shard_client` (reads) and `shard_server` (serving) do the I/O.

mod actor;
mod copies;
pub mod core;
mod fetch;
mod handle;
mod limiter;
mod options;
mod pace;
mod shard_client;
mod shard_server;
mod shared;
pub mod wire;

pub use self::core::limits::Timing;
pub use self::core::{
    Away, Counts, HealAction, HealOptions, HealView, Healing, Kept, Load, Meter, Offer, Progress,
    Pull, PullAction, PullEvent, Source, Traffic, Twin, Wanted,
};
pub use doppler_ids::{Address, BadAddress, BadPeerId, PeerId, Transport};
pub use doppler_swarm::{
    Bootstrap, BootstrapState, Path, QUIET_LOGS, Reach, Reachability, RelayMode, SwarmError,
    SwarmKey, certificates, check_certificate, generate_certificate, install_crypto,
};
pub use handle::{KnownModel, Mesh, MeshHandle, PeerInfo, Stats, topic};
pub use options::{
    FIND_TIMEOUT, LIMIT_MIN, MeshError, MeshOptions, PROTOCOL_VERSION, SHARD_PROTOCOL,
    SWARM_NAME_BYTES_MAX, UPLOAD_SLOTS,
};
