//! How a mesh is started, why it may not start, and the bounds of what does its I/O. Those of
//! its decisions are in `core::limits`.

use std::time::Duration;

use doppler_ids::Address;
use doppler_swarm::{RelayMode, SwarmError, SwarmKey};

use super::core::limits::Timing;
use super::core::{Refused, TooMany};
use doppler_store::signature::SignatureError;

/// How to start a mesh.
#[derive(Clone)]
pub struct MeshOptions {
    /// Nodes of one name see each other's models; different names share nothing but a wire.
    pub swarm_name: String,
    /// The node's Ed25519 secret key.
    pub seed: [u8; 32],
    pub listen: Vec<Address>,
    /// Announced beside what this node sees of itself, for example `/dns4/HOST/tcp/443/wss`.
    pub external: Vec<Address>,
    /// PEM of the WebRTC listeners' certificate; one for this run when absent.
    pub webrtc_certificate: Option<String>,
    /// Makes the swarm private: who cannot prove it is refused on every transport.
    pub swarm_key: Option<SwarmKey>,
    /// Certificates, in DER, that may vouch for a proxy that ends TLS, beside the web's.
    pub tls_roots: Vec<Vec<u8>>,
    pub bootstrap: Vec<Address>,
    /// Where peers were reached before, each with its id: dialled once, at the start.
    pub known: Vec<Address>,
    pub mdns: bool,
    /// What to do with relays; with any but `Off`, holes are punched, too.
    pub relay: RelayMode,
    /// Ask peers whether they reach this node.
    pub ask_reach: bool,
    /// Ask the router to forward the listening ports.
    pub upnp: bool,
    /// How long a read looks for a holder before it is `NotFound`.
    pub find_timeout: Duration,
    pub timing: Timing,
    /// Replies sent at once.
    pub upload_slots: usize,
    /// Bytes of objects a second that are sent to peers, and taken from them, at most;
    /// no less than [`LIMIT_MIN`]. Gossip and the rest of the wire are not counted.
    pub upload_limit: Option<u64>,
    pub download_limit: Option<u64>,
}

impl MeshOptions {
    /// A swarm's name, a node's key, and defaults for everything else (no listener, no mDNS).
    pub fn new(swarm_name: impl Into<String>, seed: [u8; 32]) -> Self {
        Self {
            swarm_name: swarm_name.into(),
            seed,
            listen: Vec::new(),
            external: Vec::new(),
            webrtc_certificate: None,
            swarm_key: None,
            tls_roots: Vec::new(),
            bootstrap: Vec::new(),
            known: Vec::new(),
            mdns: false,
            relay: RelayMode::Off,
            ask_reach: false,
            upnp: false,
            find_timeout: FIND_TIMEOUT,
            timing: Timing::default(),
            upload_slots: UPLOAD_SLOTS,
            upload_limit: None,
            download_limit: None,
        }
    }
}

/// Default of `MeshOptions::find_timeout`: three anti-entropy rounds.
pub const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Default of `MeshOptions::upload_slots`: at 4 MiB each they bound 64 MiB of replies in memory.
pub const UPLOAD_SLOTS: usize = 16;
/// The lowest limit on bytes a second: below it transfers count as stalled.
pub const LIMIT_MIN: u64 = 64 * 1024;
/// Under a limit: bytes that each reply under way should get a second, so that it does not
/// look stalled (there are fewer slots then), and bytes that are let through at a time.
pub(super) const LIMITED_SLOT_RATE: u64 = 128 * 1024;
pub(super) const LIMITED_BYTES: usize = 16 * 1024;
/// A swarm's name, in bytes.
pub const SWARM_NAME_BYTES_MAX: usize = 64;

/// The shard protocol's name; its messages are in `proto/shard.proto`.
pub const SHARD_PROTOCOL: &str = "/doppler/shard/1";
/// What peers must identify with to stay connected.
pub const PROTOCOL_VERSION: &str = "/doppler/1";

/// Peers known from before that are dialled at the start.
pub(super) const KNOWN_MAX: usize = 64;

/// A transfer slower than this is abandoned, however steadily it drips.
pub(super) const RATE_MIN: u64 = 32 * 1024;
/// Time that every request gets before `RATE_MIN` counts.
pub(super) const REQUEST_GRACE: Duration = Duration::from_secs(10);

/// Orders that wait for a read: it has at most 16 requests, each of which is asked, kept or
/// dropped, and stopped once before it takes them.
pub(super) const ORDERS_MAX: usize = 64;
/// Streams kept open to one peer for the next request.
pub(super) const IDLE_STREAMS_PER_PEER_MAX: usize = 8;
/// A kept stream older than this is not used again: below the server's own limit.
pub(super) const IDLE_STREAM_CLIENT: Duration = Duration::from_secs(30);
/// The server closes a stream that asks nothing for this long.
pub(super) const IDLE_STREAM_SERVER: Duration = Duration::from_secs(60);
/// Streams served at once, over all peers and for one.
pub(super) const STREAMS_MAX: usize = 512;
pub(super) const STREAMS_PER_PEER_MAX: usize = 32;
/// Wait for an upload slot before a request is answered "overloaded".
pub(super) const SLOT_WAIT: Duration = Duration::from_millis(1500);
/// How long reading and encoding one range may take here. With `SLOT_WAIT` below
/// `Timing::idle`, so that a busy peer says so before it counts as stalled.
pub(super) const ENCODE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes written at once between time-outs; also the largest frame a browser's transport takes well.
pub(super) const WRITE_BYTES: usize = 64 * 1024;

/// Why the mesh cannot start or do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error(transparent)]
    Swarm(#[from] SwarmError),
    #[error("swarm name {0:?}: it must be 1 to {SWARM_NAME_BYTES_MAX} bytes")]
    BadSwarmName(String),
    #[error("no listen address became ready within {} s", .0.as_secs())]
    NotListening(Duration),
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("a limit of {0} bytes a second: it must be at least {LIMIT_MIN} (64 KiB/s)")]
    LimitTooLow(u64),
    #[error(transparent)]
    TooMany(#[from] TooMany),
}

impl From<Refused> for MeshError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::TooMany(error) => error.into(),
            Refused::Signature(error) => error.into(),
        }
    }
}
