//! What carries connections: QUIC, TCP, WebSocket and WebRTC-direct, all ending in
//! one authenticated, multiplexed form, so that nothing above tells them apart.
//!
//! Invariant: no connection leaves this file without the remote's proven peer id.

use futures::future::Either;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, dns, noise, quic, tcp, websocket, yamux};

use crate::SwarmError;
use crate::behaviour::setup;
use crate::options::{CONNECTION_STREAMS_MAX, Options, WEBSOCKET_FRAME_BYTES_MAX};
use crate::webrtc;

/// An authenticated connection that carries streams.
pub(crate) type Connection = (PeerId, StreamMuxerBox);

/// Picks the process's TLS provider. More than one gets linked, and then rustls refuses to
/// choose: the first handshake would panic. Call this first thing in `main`; later calls do nothing.
pub fn install_crypto() {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Every transport of a node. Which of them it listens on is decided by its listen addresses.
pub(crate) fn build(keys: &Keypair, options: &Options) -> Result<Boxed<Connection>, SwarmError> {
    install_crypto();
    let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
    // New ports are allocated per dial, so a socket per transport is enough.
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
    let native = dns::tokio::Transport::system(either(quic, plain)).map_err(names)?.boxed();

    // Names are resolved below the WebSocket, which needs them for TLS and its Host header.
    let resolved = dns::tokio::Transport::system(sockets()).map_err(names)?;
    let mut frames = websocket::Config::new(resolved);
    frames.set_max_data_size(WEBSOCKET_FRAME_BYTES_MAX);
    let browsers =
        frames.upgrade(Version::V1Lazy).authenticate(encryption).multiplex(multiplexing()).boxed();
    let direct = webrtc::listener(keys, options.webrtc_certificate.as_deref())?;
    // WebSocket stands before TCP, which would take the front of its addresses for its own.
    Ok(either(either(browsers, direct), native))
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
