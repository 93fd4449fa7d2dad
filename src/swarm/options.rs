//! What a swarm is started with, and every bound it keeps.

use std::time::Duration;

use crate::{Address, RelayMode, SwarmKey};

/// How to start a swarm.
#[derive(Clone)]
pub struct Options {
    /// The node's Ed25519 secret key.
    pub seed: [u8; 32],
    /// Where to listen; an empty list makes a node that only dials.
    pub listen: Vec<Address>,
    /// Addresses kept dialled: redialled with backoff whenever they are not connected.
    pub bootstrap: Vec<Address>,
    /// Find and be found on the local network.
    pub mdns: bool,
    /// `NAME/VERSION`, told to peers.
    pub agent: String,
    /// Peers that identify with another protocol version are disconnected.
    pub protocol_version: String,
    /// Gossip topics to take part in; peers' other topics are ignored.
    pub topics: Vec<String>,
    /// Addresses at which others reach this node although it cannot see that itself:
    /// a proxy that ends TLS (`/dns4/HOST/tcp/443/wss`), or a forwarded port.
    pub external: Vec<Address>,
    /// Certificate and private key of the WebRTC listeners, PEM, as
    /// [`generate_certificate`](crate::generate_certificate) makes them; one for this run when absent.
    pub webrtc_certificate: Option<String>,
    /// Makes the swarm private: a peer that cannot prove this key is refused before any
    /// protocol, on every transport; without it, a peer that asks for one is.
    pub swarm_key: Option<SwarmKey>,
    /// Certificates, beside those that the web trusts, that may vouch for a proxy that ends
    /// TLS (`/tls/ws`, `/wss`), in DER as [`certificates`](crate::certificates) gives them.
    pub tls_roots: Vec<Vec<u8>>,
    /// What to do with relays. With any but `Off`, connections that come about through one
    /// are made direct where that can be done (DCUtR).
    pub relay: RelayMode,
    /// Ask peers whether they reach this node, and tell them the same (AutoNAT).
    pub ask_reach: bool,
    /// Ask the router to forward the listening ports (UPnP). Never done by a node that
    /// listens on loopback only.
    pub upnp: bool,
    pub limits: Limits,
}

impl Options {
    /// A node's key; it listens nowhere, knows nobody and has no topics.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            seed,
            listen: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            agent: String::new(),
            protocol_version: String::new(),
            topics: Vec::new(),
            external: Vec::new(),
            webrtc_certificate: None,
            swarm_key: None,
            tls_roots: Vec::new(),
            relay: RelayMode::Off,
            ask_reach: false,
            upnp: false,
            limits: Limits::default(),
        }
    }
}

impl std::fmt::Debug for Options {
    /// Leaves the secret keys out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("listen", &self.listen)
            .field("bootstrap", &self.bootstrap)
            .field("mdns", &self.mdns)
            .field("agent", &self.agent)
            .field("protocol_version", &self.protocol_version)
            .field("topics", &self.topics)
            .field("external", &self.external)
            .field("swarm_key", &self.swarm_key)
            .field("relay", &self.relay)
            .field("ask_reach", &self.ask_reach)
            .field("upnp", &self.upnp)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Connection limits. The defaults fit a node on a home or office line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Handshakes in progress that others began.
    pub pending_incoming: u32,
    /// Dials in progress.
    pub pending_outgoing: u32,
    /// Connections that others opened.
    pub established_incoming: u32,
    /// All connections.
    pub established: u32,
    /// Connections to one peer: two, because both sides may dial at once, one that a relay
    /// carries until it is made direct, and one that tries whether this node is reached.
    pub established_per_peer: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_incoming: 64,
            pending_outgoing: 64,
            // Below `established`, so that a crowd from outside cannot take
            // away this node's own dials.
            established_incoming: 192,
            established: 256,
            established_per_peer: 4,
        }
    }
}

/// The largest gossip message; gossipsub's own default, and what peers accept.
pub const GOSSIP_BYTES_MAX: usize = 64 * 1024;

/// Gossip messages waiting for the caller. At 64 KiB each this bounds 16 MiB; beyond
/// it messages are dropped, which anti-entropy in the caller must repair anyway.
pub(crate) const MESSAGE_QUEUE: usize = 256;

/// Commands waiting for the swarm loop; each is small and handled without waiting.
pub(crate) const COMMAND_QUEUE: usize = 1024;

/// Accepted streams waiting for the caller of one protocol; the accept loop drops
/// (resets) further ones rather than stall, and the remote tries again.
pub(crate) const INCOMING_QUEUE: usize = 128;

/// Publications kept while nobody is subscribed; the oldest gives way, since newer
/// announcements replace older ones.
pub(crate) const OUTBOX: usize = 64;

/// How often the loop looks at redials, the outbox and bans: short enough that a
/// node joins within a heartbeat, long enough to cost nothing.
pub(crate) const TICK: Duration = Duration::from_millis(200);

/// First and longest wait before a bootstrap address is dialled again: a neighbour
/// process that starts a moment later is met at once, a dead host costs one dial a minute.
pub(crate) const REDIAL_FIRST: Duration = Duration::from_millis(250);
pub(crate) const REDIAL_MAX: Duration = Duration::from_secs(60);

/// How much sooner a peer's QUIC addresses are dialled than its others: longer than a
/// handshake over most lines, shorter than anybody waits where UDP is blocked.
pub(crate) const HEAD_START: Duration = Duration::from_millis(500);

/// Peers of which some addresses are still to be dialled.
pub(crate) const DIALS_WAITING_MAX: usize = 256;

/// Bootstrap addresses kept; more than anyone types, less than a flood.
pub(crate) const BOOTSTRAP_MAX: usize = 64;

/// Addresses remembered of one peer: four transports on a few interfaces.
pub(crate) const PEER_ADDRESSES_MAX: usize = 16;

/// External addresses a node may announce.
pub(crate) const EXTERNAL_MAX: usize = 8;

/// Bytes of a peer's agent string that are kept and shown.
pub(crate) const AGENT_BYTES_MAX: usize = 64;

/// A connection without streams is closed after this; gossip keeps mesh peers alive,
/// and a node waiting between tokens should not have to dial again.
pub(crate) const IDLE_CONNECTION: Duration = Duration::from_secs(300);

/// Pings notice a silent peer: interval and time-out together bound how long.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(10);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams a peer may have half-open at once on one connection.
pub(crate) const NEGOTIATING_STREAMS_MAX: usize = 64;

/// Streams of one connection in use: gossip, ping, identify and shard streams.
pub(crate) const CONNECTION_STREAMS_MAX: usize = 256;

/// The largest WebSocket message taken in. A peer's multiplexer sends at most 1 MiB
/// at once, and encryption may leave several of its frames in one message.
pub(crate) const WEBSOCKET_FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes of one write on a WebRTC stream: a message of 16 KiB with its envelope (the
/// webrtc-direct specification's limit).
pub(crate) const WEBRTC_WRITE_BYTES_MAX: usize = 16 * 1024 - 64;

/// Browsers that are connected by WebRTC or about to be, for each listening address.
pub(crate) const WEBRTC_CLIENTS_MAX: usize = 1024;

/// Names of ended WebRTC connections that are remembered: a browser may go on asking by one
/// for half a minute.
pub(crate) const WEBRTC_ENDED_MAX: usize = 256;

/// Browsers that wait for their connection to be begun.
pub(crate) const WEBRTC_ARRIVALS_MAX: usize = 64;

/// Streams that a browser opened and nobody has looked at yet.
pub(crate) const WEBRTC_OPENED_MAX: usize = 16;

/// A browser asks every two or three seconds whether its path still works. After so long
/// without a packet the path is in doubt, and after so long in doubt the connection is over.
pub(crate) const WEBRTC_DISCONNECTED_TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const WEBRTC_FAILED_TIMEOUT: Duration = Duration::from_secs(10);

/// How long closing a WebRTC connection may take that nobody uses any more.
pub(crate) const WEBRTC_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a node that speaks another protocol is left alone.
pub(crate) const FOREIGN_BAN: Duration = Duration::from_secs(600);

/// How long a peer without the swarm's key is left alone: guessing at 32 bytes gains nothing
/// from more, and a mended configuration is let in soon.
pub(crate) const KEY_BAN: Duration = Duration::from_secs(60);

/// How long a peer that was refused may take to hang up, before this node does.
pub(crate) const VERDICT_TIMEOUT: Duration = Duration::from_secs(1);

/// Refusals are told to people at most this often; the others only to a detailed log.
pub(crate) const REFUSAL_LOG_EVERY: Duration = Duration::from_secs(1);

/// Peers at once that a node without a key tells so.
pub(crate) const DECLINES_MAX: usize = 32;

/// Refusals waiting to be recorded; beyond it they are refused all the same.
pub(crate) const REFUSAL_QUEUE: usize = 64;

/// Bans remembered; beyond it the one that ends first gives way.
pub(crate) const BANS_MAX: usize = 4096;

/// How long a handshake may take, from an open socket to an authenticated, multiplexed
/// connection: several round trips on the worst line. QUIC's own is five seconds.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Relays at which a node that cannot be reached keeps a place: one may go away.
pub(crate) const RELAYS_MAX: usize = 2;

/// Wait before a relay that refused a place, or went away, is asked again.
pub(crate) const RELAY_RETRY_FIRST: Duration = Duration::from_secs(10);
pub(crate) const RELAY_RETRY_MAX: Duration = Duration::from_secs(600);

/// Relays whose refusals are remembered.
pub(crate) const RELAYS_REMEMBERED_MAX: usize = 256;

/// A place younger than this is not about to be renewed: renewals come in the second half
/// of [`RESERVATION_TIME`].
pub(crate) const RELAY_SETTLED: Duration = Duration::from_secs(20 * 60);

/// What a relay keeps and carries for others: places, in all and for one peer (one for
/// each of its connections), and how long a place lasts unless it is renewed.
pub(crate) const RESERVATIONS_MAX: usize = 64;
pub(crate) const RESERVATIONS_PER_PEER_MAX: usize = 2;
pub(crate) const RESERVATION_TIME: Duration = Duration::from_secs(3600);

/// Circuits at once, in all and of one peer that dials; what each may carry, both ways
/// together, and for how long. Enough to meet and to punch a hole, or to hear of models;
/// sixteen of them at their limit are 17 KiB a second.
pub(crate) const CIRCUITS_MAX: usize = 16;
pub(crate) const CIRCUITS_PER_PEER_MAX: usize = 4;
pub(crate) const CIRCUIT_BYTES_MAX: u64 = 128 * 1024;
pub(crate) const CIRCUIT_TIME_MAX: Duration = Duration::from_secs(120);

/// Requests for places and for circuits that a relay heeds in a window; one peer has a
/// quarter of them.
pub(crate) const RELAY_WINDOW: Duration = Duration::from_secs(60);
pub(crate) const RESERVATIONS_PER_WINDOW_MAX: u32 = 64;
pub(crate) const CIRCUITS_PER_WINDOW_MAX: u32 = 64;

/// How long a relayed connection is kept beside a direct one, so that the other end has
/// the direct one, too, when it goes.
pub(crate) const RELAYED_GRACE: Duration = Duration::from_secs(1);

/// When peers are asked whether they reach this node: first after this, every so often
/// until they agree (the same one seldom), and again once they did.
pub(crate) const PROBE_FIRST: Duration = Duration::from_secs(1);
pub(crate) const PROBE_AGAIN: Duration = Duration::from_secs(5);
pub(crate) const PROBE_SAME_PEER: Duration = Duration::from_secs(60);
pub(crate) const PROBE_REFRESH: Duration = Duration::from_secs(15 * 60);

/// How long an answer may take: the other end tries address after address.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(45);

/// Addresses of one asker that this node tries, and how many askers it heeds in a period,
/// in all and the same one.
pub(crate) const PROBED_ADDRESSES_MAX: usize = 16;
pub(crate) const PROBE_PERIOD: Duration = Duration::from_secs(60);
pub(crate) const PROBES_PER_PERIOD_MAX: usize = 32;
pub(crate) const PROBES_PER_PEER_MAX: usize = 3;

/// Addresses that peers say they see this node at and that are tried beside those it
/// listens on.
pub(crate) const CANDIDATES_MAX: usize = 8;

/// Addresses announced because a peer reached this node there, or a router maps them.
pub(crate) const CONFIRMED_MAX: usize = 16;

/// Certificates of authorities that are taken from one file: system bundles have 150.
pub(crate) const TLS_ROOTS_MAX: usize = 1024;

/// Ports that a router is asked to forward: four transports on a few interfaces.
pub(crate) const MAPPED_PORTS_MAX: usize = 16;

/// How long a node that stops waits for its router to take port mappings back.
pub(crate) const UNMAP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long opening a stream may take, negotiation and (if needed) dialling included.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long shutting down may take before the swarm's thread is left to end by itself.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
