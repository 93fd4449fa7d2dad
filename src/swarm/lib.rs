//! The libp2p swarm of a node, behind plain channels.
//!
//! Owns: transports (QUIC, TCP, WebSocket, WebRTC-direct), encryption, connection limits, peer
//! discovery by bootstrap address and mDNS, NAT traversal (relays, hole punching, port mapping), a
//! private swarm's gate, gossip delivery and raw streams. Knows nothing of models, shards or who
//! holds what. Invariant: no caller ever waits for the swarm loop, and the loop never waits for a
//! caller. Every channel between them is bounded; what does not fit is dropped and counted.
//!
//! It is a crate of its own because a libp2p swarm is generic and compiled where it is used: behind
//! this boundary, a change elsewhere does not compile it again.

mod activity;
mod actor;
mod behaviour;
mod carrier;
mod convert;
mod counted;
mod dials;
mod gate;
mod handle;
mod key;
mod nat;
mod options;
mod outbox;
mod paths;
mod reach;
mod redial;
mod relay;
mod runs;
mod selves;
mod stream;
mod streams;
mod topics;
mod transport;
mod upnp;
mod webrtc;
mod wide;

pub use carrier::{Arrival, Carrier, Duplex, Listening, RawStream};
pub use doppler_ids::{Address, BadAddress, BadPeerId, PeerId, Transport};
pub use gate::{Refusal, prove_key};
pub use handle::{
    Counters, IncomingStream, IncomingStreams, Message, Notice, Peer, Peers, SwarmEvents,
    SwarmHandle,
};
pub use key::{KEY_PROTOCOL, KeyFailure, Side, SwarmKey};
pub use options::{Limits, Options, QUIET_LOGS};
pub use paths::Path;
pub use reach::{Reach, Reachability};
pub use redial::{Bootstrap, BootstrapState};
pub use relay::RelayMode;
pub use stream::Stream;
pub use transport::{certificates, install_crypto};
pub use webrtc::{check_certificate, generate_certificate};

/// Why the swarm could not be started, or could not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    #[error("cannot listen on {address}: {reason}")]
    Listen { address: Address, reason: String },
    #[error("cannot set up {what}: {reason}")]
    Setup { what: &'static str, reason: String },
    #[error("cannot open a stream to {peer}: {reason}")]
    Open { peer: PeerId, reason: String },
    #[error("the protocol {0} is already being served")]
    AlreadyServed(String),
    #[error("{0:?} is not a protocol name (it must start with '/')")]
    BadProtocol(String),
    #[error("the swarm's command queue is full; try again later")]
    Busy,
    #[error("the swarm has been shut down")]
    Closed,
}
