//! The options of a swarm, and all of its bounds.

use std::sync::Arc;
use std::time::Duration;

use crate::redial::Pauses;
use crate::{Address, Carrier, RelayMode, SwarmKey};

/// Log directives for libraries that complain whenever a link is down, although they try again.
pub const QUIET_LOGS: &str = "libp2p_mdns=off,quinn_udp=off";

/// How to start a swarm.
#[derive(Clone)]
pub struct Options {
    /// The node's Ed25519 secret key.
    pub seed: [u8; 32],
    /// Where to listen; an empty list makes a node that only dials.
    pub listen: Vec<Address>,
    /// Addresses to stay connected to. They are redialled with backoff when not connected.
    pub bootstrap: Vec<Address>,
    /// Whether to find peers on the local network and be found there.
    pub mdns: bool,
    /// `NAME/VERSION`, sent to peers.
    pub agent: String,
    /// A number drawn for this run, sent with it: two that are connected at once under one peer id
    /// are two nodes.
    pub run: u64,
    /// Peers that identify with another protocol version are disconnected.
    pub protocol_version: String,
    /// Gossip topics to subscribe to; peers' other topics are ignored.
    pub topics: Vec<String>,
    /// What the names of further topics begin with, which the node may join as it runs.
    pub topic_prefix: Option<String>,
    /// Addresses at which others reach this node although it does not listen there: a proxy
    /// that terminates TLS (`/dns4/HOST/tcp/443/wss`), or a forwarded port.
    pub external: Vec<Address>,
    /// Certificate and private key of the WebRTC listeners, in PEM, as
    /// [`generate_certificate`](crate::generate_certificate) returns them. If absent, one is
    /// generated for this run.
    pub webrtc_certificate: Option<String>,
    /// Makes the swarm private: a peer that cannot prove this key is refused before any
    /// protocol, on every transport. Without a key, a peer that asks for one is refused.
    pub swarm_key: Option<SwarmKey>,
    /// Certificates of authorities, beside the web's usual ones, that are trusted for proxies
    /// that terminate TLS (`/tls/ws`, `/wss`), in DER as [`certificates`](crate::certificates)
    /// returns them.
    pub tls_roots: Vec<Vec<u8>>,
    /// What to do with relays. In every mode but `Off`, relayed connections are upgraded to
    /// direct ones where possible (DCUtR).
    pub relay: RelayMode,
    /// Whether to ask peers if they can dial this node, and to answer such requests (AutoNAT).
    pub ask_reach: bool,
    /// Whether to ask the router to forward the listening ports (UPnP). A node that listens on
    /// loopback only never does.
    pub upnp: bool,
    /// Carries the node's connections in place of the system's sockets.
    pub carrier: Option<Arc<dyn Carrier>>,
    pub limits: Limits,
}

impl Options {
    /// Options with a node's key, without listen addresses, peers or topics.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            seed,
            listen: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            agent: String::new(),
            run: 0,
            protocol_version: String::new(),
            topics: Vec::new(),
            topic_prefix: None,
            external: Vec::new(),
            webrtc_certificate: None,
            swarm_key: None,
            tls_roots: Vec::new(),
            relay: RelayMode::Off,
            ask_reach: false,
            upnp: false,
            carrier: None,
            limits: Limits::default(),
        }
    }
}

impl std::fmt::Debug for Options {
    /// Omits the secret keys.
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
    /// Incoming handshakes in progress.
    pub pending_incoming: u32,
    /// Dials in progress.
    pub pending_outgoing: u32,
    /// Incoming connections.
    pub established_incoming: u32,
    /// All connections.
    pub established: u32,
    /// Connections to one peer. The default allows two because both sides may dial at once, a
    /// relayed one until a direct one replaces it, and one that probes whether this node can be
    /// dialled.
    pub established_per_peer: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_incoming: 64,
            pending_outgoing: 64,
            // Below `established`, so that incoming connections cannot use up
            // the room for this node's own dials.
            established_incoming: 192,
            established: 256,
            established_per_peer: 4,
        }
    }
}

/// The largest gossip message: gossipsub's default, which peers accept.
pub const GOSSIP_BYTES_MAX: usize = 64 * 1024;

/// Gossip messages waiting for the caller, 16 MiB at worst. Beyond it messages are
/// dropped, which the caller's anti-entropy repairs.
pub(crate) const MESSAGE_QUEUE: usize = 256;

/// Commands waiting for the swarm loop. Each is small and handled without waiting.
pub(crate) const COMMAND_QUEUE: usize = 1024;

/// Accepted streams of one protocol waiting for the caller. Further ones are reset
/// instead of stalling the accept loop, and the peer retries.
pub(crate) const INCOMING_QUEUE: usize = 128;

/// Publications kept while nobody is subscribed. The oldest is dropped first, because newer
/// announcements replace older ones.
pub(crate) const OUTBOX: usize = 64;

/// Topics that one peer takes part in, bytes of a topic's name, and changes that it may announce at once.
pub(crate) const TOPICS_MAX: usize = 64;
pub(crate) const TOPIC_BYTES_MAX: usize = 128;
pub(crate) const SUBSCRIPTIONS_MAX: usize = 128;

/// How often the loop checks redials, the outbox and bans: often enough that a node
/// joins within a heartbeat, and rarely enough to cost nothing.
pub(crate) const TICK: Duration = Duration::from_millis(200);

/// Pauses between dials of a bootstrap address: a process that starts a moment later is reached at
/// once, one that comes back within seconds; addresses beyond the first 32 are dialled less often.
pub(crate) const REDIAL: Pauses = Pauses {
    first: Duration::from_millis(250),
    near_max: Duration::from_secs(15),
    near: 32,
    far_max: Duration::from_secs(600),
};

/// How long a bootstrap address may fail, or its peer may take part in none of this node's
/// topics, before that is said: longer than a handshake and the first gossip take.
pub(crate) const BOOTSTRAP_PATIENCE: Duration = Duration::from_secs(3);

/// The head start of a peer's QUIC addresses over its others: longer than a handshake on
/// most lines, and short enough where UDP is blocked.
pub(crate) const HEAD_START: Duration = Duration::from_millis(500);

/// Streams that tell two nodes of one identity of each other: each reaches one of them, at random.
pub(crate) const TWIN_TELLS: usize = 4;

/// How often it is looked whether two nodes of one identity are connected.
pub(crate) const RUNS_EVERY: Duration = Duration::from_secs(10);

/// How often the local network is asked for peers. libp2p's five minutes would keep two nodes apart
/// for so long that started while the network between them was down.
pub(crate) const MDNS_INTERVAL: Duration = Duration::from_secs(15);

/// What is noticed of peers that are not connected, waiting for the caller. Beyond it notices are
/// dropped: a peer is found again, and a dial fails again.
pub(crate) const NOTICE_QUEUE: usize = 256;

/// Peers with addresses left to dial.
pub(crate) const DIALS_WAITING_MAX: usize = 256;

/// Bootstrap addresses that are used: more than anyone types.
pub(crate) const BOOTSTRAP_MAX: usize = 64;

/// Addresses remembered per peer: four transports over two families on a few interfaces.
pub(crate) const PEER_ADDRESSES_MAX: usize = 32;

/// External addresses a node may announce.
pub(crate) const EXTERNAL_MAX: usize = 8;

/// Bytes of a peer's agent string that are kept and shown.
pub(crate) const AGENT_BYTES_MAX: usize = 64;

/// Bytes of the reason why a bootstrap address failed that are kept and shown.
pub(crate) const REASON_BYTES_MAX: usize = 240;

/// A connection without streams is closed after this. Gossip keeps mesh peers connected;
/// others should stay long enough that a node does not have to redial between tokens.
pub(crate) const IDLE_CONNECTION: Duration = Duration::from_secs(300);

/// Pings detect a silent peer, within the interval plus the time-out.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(10);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// So many pings in a row may fail while bytes are written to a peer, which the system may take for
/// a dead one for a while. While bytes come, pings may fail.
pub(crate) const PINGS_LOST_MAX: u32 = 3;

/// Streams of one connection that a peer may be negotiating at once.
pub(crate) const NEGOTIATING_STREAMS_MAX: usize = 64;

/// Open streams of one connection: gossip, ping, identify and shard streams.
pub(crate) const CONNECTION_STREAMS_MAX: usize = 256;

/// The largest WebSocket message accepted. A peer's multiplexer sends at most 1 MiB
/// at once, and encryption may put several of its frames into one message.
pub(crate) const WEBSOCKET_FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The largest write on a WebRTC stream, so that a message with its envelope stays within 16 KiB
/// (the webrtc-direct specification's limit).
pub(crate) const WEBRTC_WRITE_BYTES_MAX: usize = 16 * 1024 - 64;

/// Browsers that are connected or connecting by WebRTC, per listening address.
pub(crate) const WEBRTC_CLIENTS_MAX: usize = 1024;

/// Names of ended WebRTC connections that are remembered: a browser may keep sending requests
/// under one for half a minute.
pub(crate) const WEBRTC_ENDED_MAX: usize = 256;

/// Browsers waiting for the node to start their connection.
pub(crate) const WEBRTC_ARRIVALS_MAX: usize = 64;

/// Streams that a browser opened and that are not yet accepted.
pub(crate) const WEBRTC_OPENED_MAX: usize = 16;

/// ICE time-outs: without a packet for the first, a connection counts as disconnected; after the
/// second in that state it has failed. A browser checks its path every two or three seconds.
pub(crate) const WEBRTC_DISCONNECTED_TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const WEBRTC_FAILED_TIMEOUT: Duration = Duration::from_secs(10);

/// How long closing an unused WebRTC connection may take.
pub(crate) const WEBRTC_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a node with another protocol version is banned.
pub(crate) const FOREIGN_BAN: Duration = Duration::from_secs(600);

/// How long a peer without the swarm's key is banned. A longer ban would not make guessing
/// 32 bytes any harder, and a corrected configuration works soon.
pub(crate) const KEY_BAN: Duration = Duration::from_secs(60);

/// How long a refused peer may take to hang up before this node does.
pub(crate) const VERDICT_TIMEOUT: Duration = Duration::from_secs(1);

/// Refusals are logged as warnings at most this often; the others only at debug level.
pub(crate) const REFUSAL_LOG_EVERY: Duration = Duration::from_secs(1);

/// Peers that a node without a key answers at once to say so.
pub(crate) const DECLINES_MAX: usize = 32;

/// Refusals waiting to be recorded. Beyond it peers are still refused, but not recorded.
pub(crate) const REFUSAL_QUEUE: usize = 64;

/// Bans remembered; beyond it the one that ends first is lifted.
pub(crate) const BANS_MAX: usize = 4096;

/// How long a handshake may take, from an open socket to an authenticated, multiplexed
/// connection: several round trips on a very slow line. QUIC's own limit is five seconds.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Relays at which a node that cannot be dialled keeps a reservation: more than one, because one
/// may go away.
pub(crate) const RELAYS_MAX: usize = 2;

/// First and longest wait before a relay that refused a reservation or went away is asked again.
pub(crate) const RELAY_RETRY_FIRST: Duration = Duration::from_secs(10);
pub(crate) const RELAY_RETRY_MAX: Duration = Duration::from_secs(600);

/// Relays whose refusals are remembered.
pub(crate) const RELAYS_REMEMBERED_MAX: usize = 256;

/// A reservation younger than this is not about to be renewed: renewals come in the second half
/// of [`RESERVATION_TIME`].
pub(crate) const RELAY_SETTLED: Duration = Duration::from_secs(20 * 60);

/// Reservations that a relay grants, in total and per peer (one for each of its connections),
/// and how long one lasts unless it is renewed.
pub(crate) const RESERVATIONS_MAX: usize = 64;
pub(crate) const RESERVATIONS_PER_PEER_MAX: usize = 2;
pub(crate) const RESERVATION_TIME: Duration = Duration::from_secs(3600);

/// Circuits at once, in total and per dialling peer; what each may carry, both directions
/// together, and for how long. Enough to meet and to punch a hole, or to learn of models.
/// Sixteen of them at their limit are 17 KiB a second.
pub(crate) const CIRCUITS_MAX: usize = 16;
pub(crate) const CIRCUITS_PER_PEER_MAX: usize = 4;
pub(crate) const CIRCUIT_BYTES_MAX: u64 = 128 * 1024;
pub(crate) const CIRCUIT_TIME_MAX: Duration = Duration::from_secs(120);

/// Requests for reservations and for circuits that a relay accepts per window; one peer gets
/// at most a quarter of them.
pub(crate) const RELAY_WINDOW: Duration = Duration::from_secs(60);
pub(crate) const RESERVATIONS_PER_WINDOW_MAX: u32 = 64;
pub(crate) const CIRCUITS_PER_WINDOW_MAX: u32 = 64;

/// How long a relayed connection is kept beside a direct one, so that the other end has the
/// direct one, too, before the relayed one closes.
pub(crate) const RELAYED_GRACE: Duration = Duration::from_secs(1);

/// When peers are asked whether they can dial this node: the first time after this, then at this
/// interval until the answer is certain (the same peer less often), and then at the last one.
pub(crate) const PROBE_FIRST: Duration = Duration::from_secs(1);
pub(crate) const PROBE_AGAIN: Duration = Duration::from_secs(5);
pub(crate) const PROBE_SAME_PEER: Duration = Duration::from_secs(60);
pub(crate) const PROBE_REFRESH: Duration = Duration::from_secs(15 * 60);

/// How long an answer may take: the other end tries one address after another.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(45);

/// Addresses of an asking peer that this node dials, and requests that it accepts per period, in
/// total and per peer.
pub(crate) const PROBED_ADDRESSES_MAX: usize = 16;
pub(crate) const PROBE_PERIOD: Duration = Duration::from_secs(60);
pub(crate) const PROBES_PER_PERIOD_MAX: usize = 32;
pub(crate) const PROBES_PER_PEER_MAX: usize = 3;

/// Addresses at which peers see this node that are probed beside those that it listens on.
pub(crate) const CANDIDATES_MAX: usize = 8;

/// Addresses announced because a peer reached this node there.
pub(crate) const CONFIRMED_MAX: usize = 16;

/// Certificates read from one file; system bundles have 150.
pub(crate) const TLS_ROOTS_MAX: usize = 1024;

/// Ports that a router is asked to forward: four transports on a few interfaces.
pub(crate) const MAPPED_PORTS_MAX: usize = 16;

/// How long a stopping node keeps its connections open for what it published last: its goodbye.
pub(crate) const LINGER: Duration = Duration::from_millis(100);

/// How long a stopping node waits for its router to remove port mappings.
pub(crate) const UNMAP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long opening a stream may take, including negotiation and, if needed, dialling; and so many
/// times that long while other streams of the peer bring bytes.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
pub(crate) const OPEN_TIMEOUTS_MAX: usize = 6;

/// How long a shutdown waits for the swarm's thread to end.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
