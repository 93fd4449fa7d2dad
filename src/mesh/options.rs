//! How a mesh is started, why it may not start, and every bound it keeps.

use std::time::Duration;

use doppler_swarm::{Address, RelayMode, SwarmError, SwarmKey};

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
/// The lowest limit on bytes a second: below it transfers count as stalled.
pub const LIMIT_MIN: u64 = 64 * 1024;
/// What a limit lets pass at once after idling.
pub(super) const LIMIT_BURST: Duration = Duration::from_millis(100);
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

/// Announcements kept. A forgotten one comes again with anti-entropy.
pub(super) const ANNOUNCEMENTS_MAX: usize = 256;
/// Models whose object lists are registered.
pub(super) const MODELS_MAX: usize = 256;
/// Peers whose holdings are remembered, and bitmap bytes of each: 32 MiB at worst.
pub(super) const MEMBERS_MAX: usize = 512;
pub(super) const MEMBER_BYTES_MAX: usize = 64 * 1024;
/// Peers whose conduct and traffic are remembered.
pub(super) const PEERS_REMEMBERED_MAX: usize = 4096;

/// Objects that one peer is believed to hold in part, over all models: 40 KiB a peer at worst.
pub(super) const MEMBER_PARTS_MAX: usize = 1024;
/// Objects held in part that this node tells of.
pub(super) const OWN_PARTS_MAX: usize = 512;

/// Gossip messages heeded per author and window. An honest node pauses `GOSSIP_PAUSE` for
/// each message it said, which is at most 200 in a window, and usually a handful.
pub(super) const GOSSIP_WINDOW: Duration = Duration::from_secs(10);
pub(super) const GOSSIP_PER_WINDOW_MAX: u32 = 512;
pub(super) const GOSSIP_PAUSE: Duration = Duration::from_millis(50);
/// Holdings bytes packed into one message, below the envelope's limit with its other fields.
pub(super) const HOLDINGS_BYTES_TARGET: usize = 48 * 1024;

/// Peers known from before that are dialled at the start.
pub(super) const KNOWN_MAX: usize = 64;

/// Connections that are opened without a need, so that a read finds its holder connected.
pub(super) const DIAL_TARGET: usize = 32;
/// Wait before a peer that did not answer is dialled again, doubling.
pub(super) const DIAL_RETRY_FIRST: Duration = Duration::from_millis(500);
pub(super) const DIAL_RETRY_MAX: Duration = Duration::from_secs(60);

/// Reads under way; each is at most one object.
pub(super) const READS_MAX: usize = 1024;
/// Requests of one read under way. With `SERVE_BYTES_MAX` each they bound its memory.
pub(super) const REQUESTS_PER_READ_MAX: usize = 8;
/// Requests under way to one peer, a quarter of them for what a token waits for.
/// More only queue at the other side.
pub(super) const REQUESTS_PER_PEER_MAX: u32 = 16;
/// Requests under way to a peer of which no rate is known yet.
pub(super) const REQUESTS_UNMEASURED_MAX: u32 = 4;
/// A request is as long as its peer delivers in this time, within these bounds:
/// below them the round trip dominates, and a share less is not worth a second peer.
pub(super) const REQUEST_TIME: Duration = Duration::from_millis(250);
pub(super) const REQUEST_BYTES_MIN: u64 = 256 * 1024;
pub(super) const PIECE_BYTES_MIN: u64 = 1024 * 1024;
/// A peer is asked for no more at once than it delivers in this time.
pub(super) const PIPELINE_TIME: Duration = Duration::from_millis(500);
/// A peer that owes answers and sends nothing for this long is asked for nothing more,
/// and what it owes is asked of another. Well above a disk read, well below `Timing::idle`.
pub(super) const SILENT_AFTER: Duration = Duration::from_millis(400);
/// A request is late after the 95th percentile of past lateness, but never before this;
/// one to a peer that has not been measured, after that.
pub(super) const HEDGE_AFTER_MIN: Duration = Duration::from_millis(100);
pub(super) const HEDGE_UNKNOWN: Duration = Duration::from_secs(1);
/// Answers that the percentile is taken over.
pub(super) const LATENESS_SAMPLES: usize = 64;
/// Requests that are asked of two peers at once, over all reads.
pub(super) const HEDGES_MAX: usize = 32;
/// Bytes asked for twice while the first peer was still sending: so many, and this share
/// of what was delivered.
pub(super) const HEDGE_BYTES_FREE: u64 = 32 * 1024 * 1024;
pub(super) const HEDGE_SHARE: f64 = 0.1;
/// Shards remembered as begun, which are finished before others are begun.
pub(super) const STARTED_MAX: usize = 256;
/// Failed requests of one read since the last that brought something.
pub(super) const ATTEMPTS_MAX: u32 = 32;
/// Wait before a peer that failed a read is asked for it again, doubling.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(200);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);
/// A transfer slower than this is abandoned, however steadily it drips.
pub(super) const RATE_MIN: u64 = 32 * 1024;
/// Time that every request gets before `RATE_MIN` counts.
pub(super) const REQUEST_GRACE: Duration = Duration::from_secs(10);

/// How often a transfer that goes on is noted.
pub(super) const HEARD_EVERY: Duration = Duration::from_millis(50);
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
/// The largest manifest that is asked for, or sent, over a relay; nothing else of the shard
/// protocol is. Half of what a circuit carries, so that gossip has the rest.
pub(super) const RELAYED_MANIFEST_BYTES_MAX: u64 = 64 * 1024;
/// Bytes written at once between time-outs; also the largest frame a browser's transport takes well.
pub(super) const WRITE_BYTES: usize = 64 * 1024;

/// How long a first wrong byte bans a peer; each further offence doubles it.
pub(super) const BAN_FIRST: Duration = Duration::from_secs(600);
pub(super) const BAN_MAX: Duration = Duration::from_secs(24 * 3600);

/// A peer that denied so often more than it delivered what it had said it holds is not
/// asked for anything for this long.
pub(super) const DENIALS_MAX: u32 = 8;
pub(super) const DENIED_FOR: Duration = Duration::from_secs(60);

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
    #[error("{what}: at most {max}")]
    TooMany { what: &'static str, max: usize },
}
