//! What carries connections: QUIC, TCP, WebSocket, WebRTC-direct and other peers' relays,
//! all ending in one authenticated, multiplexed form, so that nothing above tells them apart.
//!
//! Invariants: no connection leaves this file without the remote's proven peer id, and, in
//! a private swarm, without passing the gate; none takes longer than its time-out to do so.

use futures::future::Either;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, dns, noise, quic, relay, tcp, websocket, yamux};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::mpsc;

use crate::SwarmError;
use crate::behaviour::setup;
use crate::gate::{Gate, Refusal};
use crate::options::{
    CONNECTION_STREAMS_MAX, HANDSHAKE_TIMEOUT, Options, TLS_ROOTS_MAX, WEBSOCKET_FRAME_BYTES_MAX,
};
use crate::relay::RelayMode;
use crate::webrtc;

/// An authenticated connection that carries streams.
pub(crate) type Connection = (PeerId, StreamMuxerBox);

/// Picks the process's TLS provider. More than one gets linked, and then rustls refuses to
/// choose: the first handshake would panic. Call this first thing in `main`; later calls do nothing.
pub fn install_crypto() {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The certificates in a PEM file, in DER; other kinds of entries are left out.
///
/// # Errors
/// Says what is wrong with the file, or that there is none or too many in it.
pub fn certificates(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let read = CertificateDer::pem_slice_iter(pem).take(TLS_ROOTS_MAX + 1);
    let read: Result<Vec<_>, _> = read.map(|one| Ok(one?.to_vec())).collect();
    let read = read.map_err(|error: rustls::pki_types::pem::Error| error.to_string())?;
    match read.len() {
        0 => Err("there is no certificate in it".into()),
        count if count > TLS_ROOTS_MAX => Err(format!("more than {TLS_ROOTS_MAX} certificates")),
        _ => Ok(read),
    }
}

fn tls(roots: &[Vec<u8>]) -> Result<websocket::tls::Config, SwarmError> {
    let mut config = websocket::tls::Config::builder();
    for root in roots {
        let root = websocket::tls::Certificate::new(root.clone());
        config.add_trust(&root).map_err(|error| setup("TLS", &error))?;
    }
    Ok(config.finish())
}

/// Every transport of a node, behind the gate if the swarm is private, and what drives the
/// relayed one. Which of them it listens on is decided by its listen addresses.
pub(crate) fn build(
    keys: &Keypair,
    options: &Options,
    refusals: mpsc::Sender<Refusal>,
) -> Result<(Boxed<Connection>, Option<relay::client::Behaviour>), SwarmError> {
    let mut transports = transports(keys, options)?;
    let mut circuits = None;
    if options.relay != RelayMode::Off {
        let (relayed, behaviour) = relay::client::new(keys.public().to_peer_id());
        let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
        let relayed = relayed
            .upgrade(Version::V1Lazy)
            .authenticate(encryption)
            .multiplex(multiplexing())
            .boxed();
        // First: the others would take the front of its addresses for their own.
        transports = either(timely(relayed), transports);
        circuits = Some(behaviour);
    }
    let transports = match &options.swarm_key {
        Some(key) => Gate::new(key.clone(), keys, refusals).guard(transports),
        None => transports,
    };
    Ok((transports, circuits))
}

fn transports(keys: &Keypair, options: &Options) -> Result<Boxed<Connection>, SwarmError> {
    install_crypto();
    let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
    // TCP has a new port for each dial, so a socket per transport is enough.
    let sockets = || tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let names = |error| setup("DNS", &error);

    let plain = sockets()
        .upgrade(Version::V1Lazy)
        .authenticate(encryption.clone())
        .multiplex(multiplexing())
        .boxed();
    let quic = quic::tokio::Transport::new(quic::Config::new(keys))
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
        .boxed();
    let native = dns::tokio::Transport::system(either(quic, timely(plain))).map_err(names)?.boxed();

    // Names are resolved below the WebSocket, which needs them for TLS and its Host header.
    let resolved = dns::tokio::Transport::system(sockets()).map_err(names)?;
    let mut frames = websocket::Config::new(resolved);
    frames.set_max_data_size(WEBSOCKET_FRAME_BYTES_MAX);
    frames.set_tls_config(tls(&options.tls_roots)?);
    let browsers =
        frames.upgrade(Version::V1Lazy).authenticate(encryption).multiplex(multiplexing()).boxed();
    let direct = webrtc::listener(keys, options.webrtc_certificate.as_deref())?;
    // WebSocket stands before TCP, which would take the front of its addresses for its own.
    Ok(either(either(timely(browsers), direct), native))
}

/// Ends a handshake that stalls: a socket that is opened and left silent takes one of few places.
fn timely(transport: Boxed<Connection>) -> Boxed<Connection> {
    TransportTimeout::new(transport, HANDSHAKE_TIMEOUT).boxed()
}

fn multiplexing() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(CONNECTION_STREAMS_MAX);
    config
}

fn either(first: Boxed<Connection>, second: Boxed<Connection>) -> Boxed<Connection> {
    OrTransport::new(first, second)
        .map(|connection, _| match connection {
            Either::Left(connection) | Either::Right(connection) => connection,
        })
        .boxed()
}
