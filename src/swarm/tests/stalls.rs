//! Peers that begin a handshake and fall silent: each is cut off after a fixed time, and
//! frees its pending connection for another peer.

use std::net::SocketAddr;
use std::time::Duration;

use doppler_swarm::{Limits, Options, SwarmHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Far longer than the node waits.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first message of multistream-select, then the name of noise.
const HELLO: &[u8] = b"\x13/multistream/1.0.0\n";
const NOISE: &[u8] = b"\x07/noise\n";

/// A client's WebSocket opening handshake.
const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
    Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_handshake_frees_its_pending_connection() {
    // There are as many silent clients as pending connections allowed.
    let openings: [(&str, Vec<Vec<u8>>); 2] = [
        (
            "/ip4/127.0.0.1/tcp/0",
            vec![
                Vec::new(),
                HELLO.to_vec(),
                // Noise has begun: half of an announced message of 32 bytes.
                [HELLO, NOISE, &[0, 32], &[7; 16]].concat(),
            ],
        ),
        (
            "/ip4/127.0.0.1/tcp/0/ws",
            vec![Vec::new(), UPGRADE.as_bytes()[..40].to_vec(), UPGRADE.into()],
        ),
    ];
    for (listen, clients) in openings {
        let options = Options {
            listen: vec![listen.parse().unwrap()],
            protocol_version: "/test/1".into(),
            limits: Limits { pending_incoming: clients.len() as u32, ..Limits::default() },
            ..Options::new(rand::random())
        };
        let (node, mut events) = SwarmHandle::spawn(options).await.unwrap();
        let ready = events.listening.wait_for(|addresses| !addresses.is_empty());
        let address = timeout(PATIENCE, ready).await.unwrap().unwrap()[0].clone();
        let port: u16 = address.to_string().split('/').nth(4).unwrap().parse().unwrap();
        let mut silent = Vec::new();
        for opening in clients {
            let mut socket =
                TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).await.unwrap();
            socket.write_all(&opening).await.unwrap();
            silent.push(socket);
        }
        // It is refused while all pending connections are taken. It redials until it is accepted,
        // which would never happen if the silent ones stayed.
        let options = Options {
            bootstrap: vec![address],
            protocol_version: "/test/1".into(),
            ..Options::new(rand::random())
        };
        let (guest, mut guest_events) = SwarmHandle::spawn(options).await.unwrap();
        for mut socket in silent {
            // Read what the node sends until the connection ends.
            let mut said = Vec::new();
            let end = timeout(PATIENCE, socket.read_to_end(&mut said)).await;
            assert!(end.is_ok(), "{listen}: still open");
        }
        let met = guest_events.peers.wait_for(|peers| peers.contains_key(&node.peer()));
        timeout(PATIENCE, met).await.expect("a connection").unwrap();
        for handle in [guest, node] {
            handle.shutdown().await;
        }
    }
}
