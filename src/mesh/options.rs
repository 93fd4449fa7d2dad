//! How a mesh is started, why it may not start, and every bound it keeps.

use std::time::Duration;

use doppler_swarm::{Address, SwarmError};

use crate::store::signature::SignatureError;

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
    pub bootstrap: Vec<Address>,
    pub mdns: bool,
    /// How long a read looks for a holder before it is `NotFound`.
    pub find_timeout: Duration,
    pub timing: Timing,
    /// Replies sent at once.
    pub upload_slots: usize,
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
            bootstrap: Vec::new(),
            mdns: false,
            find_timeout: FIND_TIMEOUT,
            timing: Timing::default(),
            upload_slots: UPLOAD_SLOTS,
        }
    }
}

/// Intervals that tests shorten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Anti-entropy: everything is said again this often, because gossip promises nothing.
    pub announce_every: Duration,
    /// How long others believe what we hold: three announcements may be lost.
    pub lease: Duration,
    /// Changes within this time are said together.
    pub settle: Duration,
    /// A transfer without a byte for this long has stalled. Far above a loaded
    /// peer's disk read, far below what a person waits for a token.
    pub idle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            announce_every: Duration::from_secs(10),
            lease: Duration::from_secs(35),
            settle: Duration::from_millis(200),
            idle: Duration::from_secs(5),
        }
    }
}

/// Default of `MeshOptions::find_timeout`: three anti-entropy rounds.
pub const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Default of `MeshOptions::upload_slots`: at 4 MiB each they bound 64 MiB of replies in memory.
pub const UPLOAD_SLOTS: usize = 16;
/// A swarm's name, in bytes.
pub const SWARM_NAME_BYTES_MAX: usize = 64;

/// The shard protocol's name; its messages are in `proto/shard.proto`.
pub const SHARD_PROTOCOL: &str = "/doppler/shard/1";
/// What peers must identify with to stay connected.
pub const PROTOCOL_VERSION: &str = "/doppler/1";

/// Announcements kept. A forgotten one comes again with anti-entropy.
pub(super) const ANNOUNCEMENTS_MAX: usize = 256;
/// Models whose object lists are registered.
pub(super) const MODELS_MAX: usize = 256;
/// Peers whose holdings are remembered, and bitmap bytes of each: 32 MiB at worst.
pub(super) const MEMBERS_MAX: usize = 512;
pub(super) const MEMBER_BYTES_MAX: usize = 64 * 1024;
/// Peers whose conduct and traffic are remembered.
pub(super) const PEERS_REMEMBERED_MAX: usize = 4096;

/// Gossip messages heeded per author and window. An honest node pauses `GOSSIP_PAUSE` for
/// each message it said, which is at most 200 in a window, and usually a handful.
pub(super) const GOSSIP_WINDOW: Duration = Duration::from_secs(10);
pub(super) const GOSSIP_PER_WINDOW_MAX: u32 = 512;
pub(super) const GOSSIP_PAUSE: Duration = Duration::from_millis(50);
/// Holdings bytes packed into one message, below the envelope's limit with its other fields.
pub(super) const HOLDINGS_BYTES_TARGET: usize = 48 * 1024;

/// Connections that are opened without a need, so that a read finds its holder connected.
pub(super) const DIAL_TARGET: usize = 32;
/// Wait before a peer that did not answer is dialled again, doubling.
pub(super) const DIAL_RETRY_FIRST: Duration = Duration::from_millis(500);
pub(super) const DIAL_RETRY_MAX: Duration = Duration::from_secs(60);

/// Requests under way to one peer. More only queue at the other side.
pub(super) const REQUESTS_PER_PEER_MAX: u32 = 16;
/// Pieces of one read under way at once.
pub(super) const PIECES_AT_ONCE: usize = 8;
/// The smallest piece worth a second peer: below it the round trip dominates.
pub(super) const PIECE_BYTES_MIN: u64 = 1024 * 1024;
/// Attempts at one piece, over all its holders.
pub(super) const ATTEMPTS_MAX: u32 = 32;
/// Wait before a peer that failed a piece is asked for it again, doubling.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(200);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);
/// A transfer slower than this is abandoned, however steadily it drips.
pub(super) const RATE_MIN: u64 = 32 * 1024;
/// Time that every request gets before `RATE_MIN` counts.
pub(super) const REQUEST_GRACE: Duration = Duration::from_secs(10);

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

/// How long a first wrong byte bans a peer; each further offence doubles it.
pub(super) const BAN_FIRST: Duration = Duration::from_secs(600);
pub(super) const BAN_MAX: Duration = Duration::from_secs(24 * 3600);

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
    #[error("{what}: at most {max}")]
    TooMany { what: &'static str, max: usize },
}
