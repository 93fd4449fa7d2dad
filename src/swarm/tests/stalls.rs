//! Peers that begin a handshake and fall silent: each is cut off after a named time, and
//! the place that it took is another's.

use std::net::SocketAddr;
use std::time::Duration;

use doppler_swarm::{Limits, Options, SwarmHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Far longer than the node waits.
const PATIENCE: Duration = Duration::from_secs(60);

/// multistream-select's first words, then noise's name.
const HELLO: &[u8] = b"\x13/multistream/1.0.0\n";
const NOISE: &[u8] = b"\x07/noise\n";

/// A WebSocket's opening, so far as the client has it to say.
const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
    Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_stalls_frees_its_place() {
    // As many places as there are silent clients.
    let openings: [(&str, Vec<Vec<u8>>); 2] = [
        (
            "/ip4/127.0.0.1/tcp/0",
            vec![
                Vec::new(),
                HELLO.to_vec(),
                // Noise begun: a message of 32 bytes is announced, half of it comes.
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
        // Refused while the places are taken, or let in once they are free: it dials again
        // until it is, which it never was if the silent ones stayed.
        let options = Options {
            bootstrap: vec![address],
            protocol_version: "/test/1".into(),
            ..Options::new(rand::random())
        };
        let (guest, mut guest_events) = SwarmHandle::spawn(options).await.unwrap();
        for mut socket in silent {
            // What the node says meanwhile, then the end.
            let mut said = Vec::new();
            let end = timeout(PATIENCE, socket.read_to_end(&mut said)).await;
            assert!(end.is_ok(), "{listen}: still open");
        }
        let met = guest_events.peers.wait_for(|peers| peers.contains_key(&node.peer()));
        timeout(PATIENCE, met).await.expect("a place").unwrap();
        for handle in [guest, node] {
            handle.shutdown().await;
        }
    }
}
