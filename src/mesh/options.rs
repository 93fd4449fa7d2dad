//! The options of a mesh, its errors, and the bounds of its I/O. The bounds of its decisions are in
//! `core::limits`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use doppler_ids::Address;
use doppler_swarm::{Carrier, RelayMode, SwarmError, SwarmKey};

use super::core::limits::Timing;
use super::core::{Refused, TooMany};
use doppler_store::signature::SignatureError;

/// How to start a mesh.
#[derive(Clone)]
pub struct MeshOptions {
    /// Nodes with the same name see each other's models. Nodes with different names share only
    /// connections.
    pub swarm_name: String,
    /// The node's Ed25519 secret key.
    pub seed: [u8; 32],
    /// Larger in each run of this identity than in all earlier ones: peers believe the later run.
    /// By default the wall clock in milliseconds, which suffices for identities that do not
    /// outlive the process.
    pub epoch: u64,
    pub listen: Vec<Address>,
    /// Announced in addition to the addresses that this node knows of itself, for example
    /// `/dns4/HOST/tcp/443/wss`.
    pub external: Vec<Address>,
    /// PEM of the WebRTC listeners' certificate. If absent, one is made for this run.
    pub webrtc_certificate: Option<String>,
    /// Makes the swarm private: a peer that cannot prove that it knows the key is refused on every
    /// transport.
    pub swarm_key: Option<SwarmKey>,
    /// Further root certificates, in DER, for a proxy that ends TLS, in addition to the web's.
    pub tls_roots: Vec<Vec<u8>>,
    pub bootstrap: Vec<Address>,
    /// Addresses at which peers were reached before, each with its id, the last met first.
    pub known: Vec<Address>,
    pub mdns: bool,
    /// How relays are used. With any value but `Off`, hole punching is on, too.
    pub relay: RelayMode,
    /// Whether to ask peers if they can reach this node.
    pub ask_reach: bool,
    /// Whether to ask the router to forward the listening ports.
    pub upnp: bool,
    /// Carries the node's connections in place of the system's sockets.
    pub carrier: Option<Arc<dyn Carrier>>,
    /// How long a read looks for a holder before it is `NotFound`.
    pub find_timeout: Duration,
    pub timing: Timing,
    /// The most replies sent at once.
    pub upload_slots: usize,
    /// The most bytes of objects a second that are sent to peers. At least [`LIMIT_MIN`]. Gossip
    /// and other traffic do not count.
    pub upload_limit: Option<u64>,
    /// The same, for bytes that are received.
    pub download_limit: Option<u64>,
}

impl MeshOptions {
    /// A swarm's name, a node's key, and defaults for everything else (no listener, no mDNS).
    pub fn new(swarm_name: impl Into<String>, seed: [u8; 32]) -> Self {
        Self {
            swarm_name: swarm_name.into(),
            seed,
            epoch: unix_ms(),
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
            carrier: None,
            find_timeout: FIND_TIMEOUT,
            timing: Timing::default(),
            upload_slots: UPLOAD_SLOTS,
            upload_limit: None,
            download_limit: None,
        }
    }
}

/// The wall clock, milliseconds since 1970.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(0)
}

/// Default of `MeshOptions::find_timeout`: three anti-entropy rounds.
pub const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Default of `MeshOptions::upload_slots`: at 4 MiB each they bound 64 MiB of replies in memory.
pub const UPLOAD_SLOTS: usize = 16;
/// The lowest limit on bytes a second. Below it transfers would count as stalled.
pub const LIMIT_MIN: u64 = 64 * 1024;
/// Under a limit: bytes per second that each reply in flight should get (there are fewer slots
/// then, and one peer gets at most a quarter of them, so several peers are served at once), and
/// bytes that are let through at a time.
pub(super) const LIMITED_SLOT_RATE: u64 = 16 * 1024;
pub(super) const LIMITED_BYTES: usize = 16 * 1024;
/// A swarm's name, in bytes.
pub const SWARM_NAME_BYTES_MAX: usize = 64;

/// The shard protocol's name; its messages are in `proto/shard.proto`.
pub const SHARD_PROTOCOL: &str = "/doppler/shard/1";
/// The protocol version with which peers must identify themselves to stay connected.
pub const PROTOCOL_VERSION: &str = "/doppler/1";

/// Peers taken over from the previous run.
pub(super) const KNOWN_MAX: usize = 64;

/// A request ends if nothing from its peer, over all requests to it, was proved for
/// `PROVED_WITHIN`, even if bytes keep dripping in, or if nothing of the request itself was proved
/// for `REQUEST_STUCK`. Late is not failed: while something is proved, the request continues.
pub(super) const PROVED_WITHIN: Duration = Duration::from_secs(30);
pub(super) const REQUEST_STUCK: Duration = Duration::from_secs(120);
/// How often that is checked.
pub(super) const PROGRESS_LOOK: Duration = Duration::from_secs(1);
/// A reply ends if its peer takes nothing of it for this long, although it takes other replies.
pub(super) const WRITE_STUCK: Duration = Duration::from_secs(60);

/// Peers whose transfers' last progress is remembered; beyond this, peers without a transfer are
/// forgotten.
pub(super) const PACES_MAX: usize = 1024;

/// The most orders waiting for a read: it has at most 16 requests, each of which is asked, kept or
/// dropped, and stopped at most once before it takes them.
pub(super) const ORDERS_MAX: usize = 64;
/// Streams kept open to one peer for the next request.
pub(super) const IDLE_STREAMS_PER_PEER_MAX: usize = 8;
/// A kept stream older than this is not reused. Below the server's own limit.
pub(super) const IDLE_STREAM_CLIENT: Duration = Duration::from_secs(30);
/// The server closes a stream without a request for this long.
pub(super) const IDLE_STREAM_SERVER: Duration = Duration::from_secs(60);
/// The most streams served at once, over all peers and per peer.
pub(super) const STREAMS_MAX: usize = 512;
pub(super) const STREAMS_PER_PEER_MAX: usize = 32;
/// How long a request waits for an upload slot before it is answered "overloaded".
pub(super) const SLOT_WAIT: Duration = Duration::from_millis(1500);
/// How long reading and encoding one range may take here. Together with `SLOT_WAIT` it is below
/// `Timing::idle`, so that a busy peer says so before it counts as stalled.
pub(super) const ENCODE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes written at once between time-outs. Also the largest frame that a browser's transport
/// handles well.
pub(super) const WRITE_BYTES: usize = 64 * 1024;

/// Why the mesh cannot start or carry out a request.
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
