//! The transports: QUIC, TCP, WebSocket, WebRTC-direct and relays. All of them give the same
//! authenticated, multiplexed form of connection, so nothing above can tell them apart.
//!
//! Invariants: every connection has proved the remote's peer id and, in a private swarm, has
//! passed the gate before it leaves this module. Neither takes longer than its time-out.

use std::sync::Arc;

use futures::future::Either;
use libp2p::core::ConnectedPoint;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, dns, noise, quic, relay, tcp, websocket};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::mpsc;

use crate::SwarmError;
use crate::activity::Activities;
use crate::behaviour::setup;
use crate::carrier::{Carried, Carrier};
use crate::convert;
use crate::counted::Counted;
use crate::gate::{Gate, Refusal};
use crate::options::{HANDSHAKE_TIMEOUT, Options, TLS_ROOTS_MAX, WEBSOCKET_FRAME_BYTES_MAX};
use crate::relay::RelayMode;
use crate::webrtc;
use crate::wide::Wide;

/// An authenticated connection that carries streams.
pub(crate) type Connection = (PeerId, StreamMuxerBox);

/// Installs the process's TLS provider. More than one is linked, so rustls would not choose one, and
/// the first handshake would panic. Call this first in `main`; later calls do nothing.
pub fn install_crypto() {
    // An error means that one is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The certificates in a PEM file, in DER. Skips entries of other kinds.
///
/// # Errors
/// If the file is malformed, or has no certificates or more than [`TLS_ROOTS_MAX`].
pub fn certificates(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let read = CertificateDer::pem_slice_iter(pem).take(TLS_ROOTS_MAX + 1);
    let read: Result<Vec<_>, _> = read.map(|one| Ok(one?.to_vec())).collect();
    let read = read.map_err(|error: rustls::pki_types::pem::Error| error.to_string())?;
    match read.len() {
        0 => Err("it has no certificate".into()),
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

/// Every transport of a node, behind the gate if the swarm is private, and the behaviour that drives
/// the relayed one. The listen addresses decide on which of them the node listens.
pub(crate) fn build(
    keys: &Keypair,
    options: &Options,
    refusals: mpsc::Sender<Refusal>,
    activities: &Activities,
) -> Result<(Boxed<Connection>, Option<relay::client::Behaviour>), SwarmError> {
    let transports = match &options.carrier {
        Some(carrier) => carried(keys, carrier.clone(), activities)?,
        None => transports(keys, options, activities)?,
    };
    let mut transports = Wide(transports).boxed();
    let mut circuits = None;
    if options.relay != RelayMode::Off {
        let (relayed, behaviour) = relay::client::new(keys.public().to_peer_id());
        let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
        let relayed = relayed
            .upgrade(Version::V1Lazy)
            .authenticate(encryption)
            .multiplex_ext(multiplexing(activities))
            .boxed();
        // It must come first: the others would accept the first part of its addresses as their own.
        transports = either(timely(relayed), transports);
        circuits = Some(behaviour);
    }
    let transports = match &options.swarm_key {
        Some(key) => Gate::new(key.clone(), keys, refusals).guard(transports),
        None => transports,
    };
    Ok((transports, circuits))
}

fn transports(
    keys: &Keypair,
    options: &Options,
    activities: &Activities,
) -> Result<Boxed<Connection>, SwarmError> {
    install_crypto();
    let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
    // TCP dials from a new port each time, so each transport can have a socket transport of its own.
    let sockets = || tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let names = |error| setup("DNS", &error);

    let plain = sockets()
        .upgrade(Version::V1Lazy)
        .authenticate(encryption.clone())
        .multiplex_ext(multiplexing(activities))
        .boxed();
    let quic = quic::tokio::Transport::new(quic::Config::new(keys))
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
        .boxed();
    let native = dns::tokio::Transport::system(either(quic, timely(plain))).map_err(names)?.boxed();

    // DNS is resolved below the WebSocket, which needs the name for TLS and its Host header.
    let resolved = dns::tokio::Transport::system(sockets()).map_err(names)?;
    let mut frames = websocket::Config::new(resolved);
    frames.set_max_data_size(WEBSOCKET_FRAME_BYTES_MAX);
    frames.set_tls_config(tls(&options.tls_roots)?);
    let browsers = frames
        .upgrade(Version::V1Lazy)
        .authenticate(encryption)
        .multiplex_ext(multiplexing(activities))
        .boxed();
    let direct = webrtc::listener(keys, options.webrtc_certificate.as_deref())?;
    // WebSocket comes before TCP, which would accept the first part of its addresses as its own.
    Ok(either(either(timely(browsers), direct), native))
}

/// As TCP, but for the sockets.
fn carried(
    keys: &Keypair,
    carrier: Arc<dyn Carrier>,
    activities: &Activities,
) -> Result<Boxed<Connection>, SwarmError> {
    let encryption = noise::Config::new(keys).map_err(|error| setup("encryption", &error))?;
    let plain = Carried::new(carrier)
        .upgrade(Version::V1Lazy)
        .authenticate(encryption)
        .multiplex_ext(multiplexing(activities))
        .boxed();
    Ok(timely(plain))
}

/// Ends handshakes that stall: a silent socket would occupy one of the few pending connections.
fn timely(transport: Boxed<Connection>) -> Boxed<Connection> {
    TransportTimeout::new(transport, HANDSHAKE_TIMEOUT).boxed()
}

/// The multiplexer of a connection to a peer, which counts what comes.
fn multiplexing(
    activities: &Activities,
) -> impl FnOnce(&PeerId, &ConnectedPoint) -> Counted + Clone + use<> {
    let activities = activities.clone();
    move |peer, _| Counted::new(activities.of(convert::peer(*peer)))
}

fn either(first: Boxed<Connection>, second: Boxed<Connection>) -> Boxed<Connection> {
    OrTransport::new(first, second)
        .map(|connection, _| match connection {
            Either::Left(connection) | Either::Right(connection) => connection,
        })
        .boxed()
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};
    use std::pin::Pin;
    use std::task::Poll;

    use futures::io::AsyncWriteExt;
    use libp2p::core::transport::{DialOpts, ListenerId, PortUse, TransportEvent};
    use libp2p::core::{Endpoint, muxing::StreamMuxerExt};

    use super::*;

    /// A node's transports, and what they count.
    fn node(seed: u8) -> (Boxed<Connection>, Activities) {
        let activities = Activities::default();
        let mut options = Options::new([seed; 32]);
        options.relay = RelayMode::Off;
        let keys = Keypair::ed25519_from_bytes([seed; 32]).unwrap();
        let (refusals, _) = mpsc::channel(1);
        (build(&keys, &options, refusals, &activities).unwrap().0, activities)
    }

    /// What a stream left behind that nobody reads any more is a sign of life, too.
    #[tokio::test]
    async fn bytes_of_no_stream_are_a_sign_of_life() {
        let ((mut listener, counted), (mut dialer, _)) = (node(1), node(2));
        listener.listen_on(ListenerId::next(), "/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
        let mut event = async || poll_fn(|cx| Pin::new(&mut listener).poll(cx)).await;
        let TransportEvent::NewAddress { listen_addr, .. } = event().await else { panic!() };
        let how = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
        let dial = dialer.dial(listen_addr, how).unwrap();
        let write = async {
            let mut muxer = dial.await.unwrap().1;
            let mut stream = poll_fn(|cx| muxer.poll_outbound_unpin(cx)).await.unwrap();
            let written = async {
                stream.write_all(b"late").await.unwrap();
                stream.flush().await.unwrap();
                pending::<()>().await;
            };
            let driven = poll_fn(|cx| muxer.poll_unpin(cx));
            tokio::select! { () = written => {}, closed = driven => panic!("{closed:?}") }
        };
        let read = async {
            let TransportEvent::Incoming { upgrade, .. } = event().await else { panic!() };
            let (peer, mut muxer) = upgrade.await.unwrap();
            // Nobody takes the stream that the bytes belong to.
            poll_fn(|cx| {
                let _ = muxer.poll_unpin(cx).map(Result::unwrap);
                match counted.of(convert::peer(peer)).is_alive(1000) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                }
            })
            .await;
        };
        let both = async {
            tokio::select! { () = write => {}, () = read => {} }
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT * 2, both).await.unwrap();
    }
}
