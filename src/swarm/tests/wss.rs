//! WebSocket through a proxy that terminates TLS, like one in front of a node that pages dial.
//! The certificates are the tests' own; the authority's key was discarded.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use doppler_swarm::{Address, Options, SwarmEvents, SwarmHandle, Transport, certificates};
use futures_rustls::TlsAcceptor;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const AUTHORITY: &[u8] = include_bytes!("data/ca.pem");
const CERTIFICATE: &[u8] = include_bytes!("data/localhost.pem");
const KEY: &[u8] = include_bytes!("data/localhost.key");

async fn node(options: Options) -> (SwarmHandle, SwarmEvents) {
    let options = Options { protocol_version: "/test/1".into(), ..options };
    SwarmHandle::spawn(options).await.unwrap()
}

/// Terminates TLS and forwards to `behind`. Reports whether each handshake succeeded.
async fn proxy(behind: SocketAddr) -> (u16, mpsc::Receiver<bool>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_slice(CERTIFICATE).unwrap()];
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(KEY).unwrap())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, handshakes) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, told) = (acceptor.clone(), told.clone());
            tokio::spawn(async move {
                let ended = acceptor.accept(socket.compat()).await;
                let _ = told.try_send(ended.is_ok());
                let Ok(ended) = ended else { return };
                let mut behind = TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut ended.compat(), &mut behind).await;
            });
        }
    });
    (port, handshakes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_behind_a_proxy_is_dialled_by_name_if_its_authority_is_trusted() {
    let listen = vec!["/ip4/127.0.0.1/tcp/0/ws".parse().unwrap()];
    let (node_handle, mut events) = node(Options { listen, ..Options::new(rand::random()) }).await;
    let ready = events.listening.wait_for(|addresses| !addresses.is_empty());
    let address = timeout(PATIENCE, ready).await.unwrap().unwrap()[0].to_string();
    let behind: u16 = address.split('/').nth(4).unwrap().parse().unwrap();
    let (port, mut handshakes) = proxy(SocketAddr::from(([127, 0, 0, 1], behind))).await;
    let id = node_handle.peer();

    let roots = certificates(AUTHORITY).unwrap();
    for form in ["tls/ws", "wss"] {
        let wss: Address = format!("/dns4/localhost/tcp/{port}/{form}/p2p/{id}").parse().unwrap();
        assert_eq!(wss.transport(), Transport::WebSocket);
        let trusting = Options { tls_roots: roots.clone(), ..Options::new(rand::random()) };
        let (handle, mut events) = node(Options { bootstrap: vec![wss.clone()], ..trusting }).await;
        let met = events.peers.wait_for(|peers| peers.contains_key(&id));
        let met = timeout(PATIENCE, met).await.expect("a connection").unwrap().clone();
        assert_eq!(met[&id].dialled, Some(wss.without_peer()));
        assert_eq!(timeout(PATIENCE, handshakes.recv()).await.unwrap(), Some(true), "{form}");
        handle.shutdown().await;

        // A node that does not trust the authority stops at the certificate.
        let (handle, events) =
            node(Options { bootstrap: vec![wss], ..Options::new(rand::random()) }).await;
        assert_eq!(timeout(PATIENCE, handshakes.recv()).await.unwrap(), Some(false), "{form}");
        assert!(events.peers.borrow().is_empty());
        handle.shutdown().await;
        while handshakes.try_recv().is_ok() {}
    }
}

#[test]
fn a_file_without_certificates_is_refused() {
    assert_eq!(certificates(AUTHORITY).unwrap().len(), 1);
    let bundle = [AUTHORITY, b"# a comment\n", CERTIFICATE, KEY].concat();
    assert_eq!(certificates(&bundle).unwrap().len(), 2);
    for bad in [&b""[..], KEY, b"-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n"] {
        assert!(certificates(bad).is_err(), "{}", String::from_utf8_lossy(bad));
    }
}
