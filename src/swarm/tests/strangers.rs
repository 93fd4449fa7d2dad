//! How a node treats foreign peers: a bare libp2p client on each transport (on WebRTC-direct it
//! stands in for a browser) that implements the swarm key's protocol from its description
//! (`docs/swarm-key.md`), correctly and incorrectly.

use std::time::Duration;

use doppler_swarm::{
    Address, KEY_PROTOCOL, KeyFailure, Options, Refusal, SwarmEvents, SwarmHandle, SwarmKey,
    generate_certificate, install_crypto,
};
use futures::{AsyncRead, AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::Boxed;
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::swarm::{Config, SwarmEvent};
use libp2p::{PeerId, StreamProtocol, Swarm, Transport, noise, quic, tcp, websocket, yamux};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// Far longer than anything here takes, some failed WebRTC dials included.
const PATIENCE: Duration = Duration::from_secs(120);

const LISTEN: [&str; 4] = [
    "/ip4/127.0.0.1/udp/0/quic-v1",
    "/ip4/127.0.0.1/tcp/0",
    "/ip4/127.0.0.1/tcp/0/ws",
    "/ip4/127.0.0.1/udp/0/webrtc-direct",
];

/// The transports on which a Rust client can be asked for a key. On WebRTC it may lose a stream
/// that the other side opens at once, because the library accepts streams only after its handshake.
fn keyed() -> impl Iterator<Item = &'static str> {
    LISTEN.into_iter().filter(|listen| !listen.contains("webrtc"))
}

/// A protocol of the node's that only a member may reach.
const INSIDE: &str = "/test/inside/1";

/// Bytes of a message that a Rust data channel accepts.
const SMALL: usize = 4096;

struct Node {
    handle: SwarmHandle,
    events: SwarmEvents,
    address: Address,
}

async fn node(listen: &str, key: Option<&SwarmKey>) -> Node {
    node_with(Options {
        listen: vec![listen.parse().unwrap()],
        swarm_key: key.cloned(),
        ..Options::new(rand::random())
    })
    .await
}

/// Starts a node that echoes every stream of `INSIDE`.
async fn node_with(options: Options) -> Node {
    let options = Options { protocol_version: "/test/1".into(), ..options };
    let (handle, mut events) = SwarmHandle::spawn(options).await.unwrap();
    let ready = events.listening.wait_for(|addresses| !addresses.is_empty());
    let address = timeout(PATIENCE, ready).await.unwrap().unwrap()[0].clone();
    let mut inside = handle.accept(INSIDE).unwrap();
    tokio::spawn(async move {
        while let Some(mut incoming) = inside.recv().await {
            tokio::spawn(async move {
                let mut buffer = [0; SMALL];
                while incoming.stream.read_exact(&mut buffer).await.is_ok() {
                    incoming.stream.write_all(&buffer).await.unwrap();
                    incoming.stream.flush().await.unwrap();
                }
            });
        }
    });
    Node { handle, events, address }
}

impl Node {
    async fn refusal(&mut self) -> Refusal {
        timeout(PATIENCE, self.events.refusals.recv()).await.expect("a refusal").unwrap()
    }

    fn knows(&self, peer: PeerId) -> bool {
        let peer = peer.to_string().parse().unwrap();
        self.events.peers.borrow().contains_key(&peer)
    }
}

/// A client with no protocol but streams.
struct Stranger {
    keys: Keypair,
    control: libp2p_stream::Control,
    key_streams: libp2p_stream::IncomingStreams,
    /// Fires when the connection is gone.
    closed: tokio::sync::mpsc::Receiver<()>,
    connected: tokio::sync::mpsc::Receiver<()>,
}

impl Stranger {
    fn dial(address: &Address) -> Self {
        Self::dial_as(Keypair::generate_ed25519(), address)
    }

    fn dial_as(keys: Keypair, address: &Address) -> Self {
        install_crypto();
        let transport = transport(&keys, &address.to_string());
        let behaviour = libp2p_stream::Behaviour::new();
        let mut control = behaviour.new_control();
        let key_streams = control.accept(StreamProtocol::new(KEY_PROTOCOL)).unwrap();
        let config = Config::with_tokio_executor().with_idle_connection_timeout(PATIENCE);
        let own = keys.public().to_peer_id();
        let mut swarm = Swarm::new(transport, behaviour, own, config);
        let is_webrtc = address.to_string().contains("webrtc");
        // The library needs a listening socket to dial WebRTC from.
        let socket = || "/ip4/127.0.0.1/udp/0/webrtc-direct".parse().unwrap();
        let mut listener = is_webrtc.then(|| swarm.listen_on(socket()).unwrap());
        let address: libp2p::Multiaddr = address.to_string().parse().unwrap();
        let (closed_in, closed) = tokio::sync::mpsc::channel(8);
        let (connected_in, connected) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            if !is_webrtc {
                swarm.dial(address.clone()).unwrap();
            }
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { .. } => swarm.dial(address.clone()).unwrap(),
                    SwarmEvent::ConnectionEstablished { .. } => {
                        let _ = connected_in.try_send(());
                    }
                    // The Rust WebRTC dialer stands in for a browser here; nodes never use it.
                    // It occasionally fails after ten seconds. It then redials from another
                    // port, as a page does.
                    SwarmEvent::OutgoingConnectionError { .. } if listener.is_some() => {
                        assert!(swarm.remove_listener(listener.unwrap()));
                    }
                    SwarmEvent::ListenerClosed { .. } => {
                        listener = Some(swarm.listen_on(socket()).unwrap());
                    }
                    SwarmEvent::ConnectionClosed { .. }
                    | SwarmEvent::OutgoingConnectionError { .. } => {
                        let _ = closed_in.try_send(());
                    }
                    _ => {}
                }
            }
        });
        Self { keys, control, key_streams, closed, connected }
    }

    fn id(&self) -> PeerId {
        self.keys.public().to_peer_id()
    }

    async fn key_stream(&mut self) -> libp2p::Stream {
        timeout(PATIENCE, self.key_streams.next()).await.expect("a challenge").unwrap().1
    }

    async fn gone(&mut self) {
        timeout(PATIENCE, self.closed.recv()).await.expect("the end").unwrap();
    }

    /// Sends and gets back more than a frame's worth, in small messages.
    async fn echo(&mut self, node: &Node) -> std::io::Result<()> {
        timeout(PATIENCE, self.connected.recv()).await.expect("a connection").unwrap();
        let peer = node.handle.peer().to_string().parse().unwrap();
        let opened = self.control.open_stream(peer, StreamProtocol::new(INSIDE)).await;
        let mut stream = opened.map_err(std::io::Error::other)?;
        for round in 0..5 {
            let sent = [round; SMALL];
            stream.write_all(&sent).await?;
            stream.flush().await?;
            let mut back = [0; SMALL];
            stream.read_exact(&mut back).await?;
            assert_eq!(back, sent);
        }
        Ok(())
    }
}

fn transport(keys: &Keypair, address: &str) -> Boxed<(PeerId, StreamMuxerBox)> {
    let sockets = tcp::tokio::Transport::new(tcp::Config::default());
    let encryption = noise::Config::new(keys).unwrap();
    if address.contains("/webrtc") {
        let certificate = libp2p_webrtc::tokio::Certificate::generate(&mut rand::rng()).unwrap();
        return libp2p_webrtc::tokio::Transport::new(keys.clone(), certificate)
            .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
            .boxed();
    }
    if address.contains("/quic") {
        return quic::tokio::Transport::new(quic::Config::new(keys))
            .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
            .boxed();
    }
    if address.contains("/ws") {
        return websocket::Config::new(sockets)
            .upgrade(Version::V1)
            .authenticate(encryption)
            .multiplex(yamux::Config::default())
            .boxed();
    }
    sockets
        .upgrade(Version::V1)
        .authenticate(encryption)
        .multiplex(yamux::Config::default())
        .boxed()
}

/// The proof, implemented from the description.
fn proof(
    key: &[u8; 32],
    side: &str,
    dialer: &[u8],
    listener: &[u8],
    nonces: [&[u8]; 2],
) -> [u8; 32] {
    let context = format!("doppler-node 2026 swarm key v1 {side}");
    let mut message = vec![dialer.len() as u8];
    message.extend(dialer);
    message.push(listener.len() as u8);
    message.extend(listener);
    message.extend(nonces.concat());
    *blake3::keyed_hash(&blake3::derive_key(&context, key), &message).as_bytes()
}

/// The dialer's answer to a challenge: 65 bytes.
fn answer(key: &SwarmKey, dialer: PeerId, node: &Node, challenge: &[u8]) -> Vec<u8> {
    let nonce: [u8; 32] = rand::random();
    let (dialer, listener) = (dialer.to_bytes(), node.handle.peer().to_bytes());
    let proof = proof(key.as_bytes(), "dialer", &dialer, &listener, [&nonce, challenge]);
    [&[1][..], &nonce, &proof].concat()
}

async fn read<const BYTES: usize>(stream: &mut (impl AsyncRead + Unpin)) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    timeout(PATIENCE, stream.read_exact(&mut bytes)).await.expect("bytes in time").unwrap();
    bytes
}

async fn write(stream: &mut libp2p::Stream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_node_answers_on_each_transport() {
    for listen in LISTEN {
        let node = node(listen, None).await;
        let mut stranger = Stranger::dial(&node.address);
        stranger.echo(&node).await.unwrap();
        assert!(node.knows(stranger.id()), "{listen}");
        node.handle.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_the_key_is_admitted_and_the_node_proves_it_too() {
    for listen in keyed() {
        let key = SwarmKey::generate();
        let node = node(listen, Some(&key)).await;
        let mut stranger = Stranger::dial(&node.address);
        let mut stream = stranger.key_stream().await;
        let challenge = read::<32>(&mut stream).await;
        let answer = answer(&key, stranger.id(), &node, &challenge);
        write(&mut stream, &answer).await;
        let verdict = read::<33>(&mut stream).await;
        let (dialer, listener) = (stranger.id().to_bytes(), node.handle.peer().to_bytes());
        let nonces = [&answer[1..33], &challenge[..]];
        let expected = proof(key.as_bytes(), "listener", &dialer, &listener, nonces);
        assert_eq!((verdict[0], &verdict[1..]), (1, &expected[..]), "{listen}");
        stranger.echo(&node).await.unwrap();
        assert!(node.knows(stranger.id()), "{listen}");
        node.handle.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_key_nothing_is_served_on_any_transport() {
    for listen in keyed() {
        let key = SwarmKey::generate();

        // A client with the key of another swarm.
        let mut node = self::node(listen, Some(&key)).await;
        let mut wrong = Stranger::dial(&node.address);
        let mut stream = wrong.key_stream().await;
        let challenge = read::<32>(&mut stream).await;
        let other = answer(&SwarmKey::generate(), wrong.id(), &node, &challenge);
        write(&mut stream, &other).await;
        assert_eq!(node.refusal().await.why, KeyFailure::WrongKey, "{listen}");
        assert!(wrong.echo(&node).await.is_err());
        assert!(!node.knows(wrong.id()));

        // A client without a key that says so.
        let mut node = self::node(listen, Some(&key)).await;
        let mut without = Stranger::dial(&node.address);
        let mut stream = without.key_stream().await;
        read::<32>(&mut stream).await;
        write(&mut stream, &[0]).await;
        let refusal = node.refusal().await;
        assert_eq!(refusal.why, KeyFailure::NoKey, "{listen}");
        assert_eq!(refusal.peer.to_string(), without.id().to_string());
        assert!(without.echo(&node).await.is_err());

        // A client that opens a protected protocol during the proof.
        let mut node = self::node(listen, Some(&key)).await;
        let mut pushy = Stranger::dial(&node.address);
        let mut stream = pushy.key_stream().await;
        read::<32>(&mut stream).await;
        let (peer, mut control) = (node.handle.peer().to_string(), pushy.control.clone());
        let inside = tokio::spawn(async move {
            let opened = control.open_stream(peer.parse().unwrap(), StreamProtocol::new(INSIDE));
            opened.await.is_ok()
        });
        // It sends half an answer and closes the stream.
        write(&mut stream, &[1; 20]).await;
        stream.close().await.unwrap();
        drop(stream);
        assert_eq!(node.refusal().await.why, KeyFailure::Broken, "{listen}");
        pushy.gone().await;
        assert!(!timeout(PATIENCE, inside).await.expect("an end").unwrap(), "{listen}");
        assert!(!node.knows(pushy.id()));
        node.handle.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_answer_cannot_be_replayed() {
    for listen in keyed() {
        let key = SwarmKey::generate();
        // The node has the same identity before and after.
        let seed = rand::random();
        let start = || {
            node_with(Options {
                listen: vec![listen.parse().unwrap()],
                swarm_key: Some(key.clone()),
                ..Options::new(seed)
            })
        };
        let node = start().await;
        let keys = Keypair::generate_ed25519();
        let mut member = Stranger::dial_as(keys.clone(), &node.address);
        let mut stream = member.key_stream().await;
        let challenge = read::<32>(&mut stream).await;
        let recorded = answer(&key, member.id(), &node, &challenge);
        write(&mut stream, &recorded).await;
        assert_eq!(read::<33>(&mut stream).await[0], 1, "{listen}");

        node.handle.shutdown().await;

        // The same peers and the same bytes on another connection.
        let mut node = start().await;
        let mut again = Stranger::dial_as(keys, &node.address);
        let mut stream = again.key_stream().await;
        assert_ne!(read::<32>(&mut stream).await, challenge);
        write(&mut stream, &recorded).await;
        assert_eq!(node.refusal().await.why, KeyFailure::WrongKey, "{listen}");
        node.handle.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_instead_of_a_proof_is_refused() {
    for listen in keyed() {
        for length in [65, 300] {
            let mut node = self::node(listen, Some(&SwarmKey::generate())).await;
            let mut stranger = Stranger::dial(&node.address);
            let mut stream = stranger.key_stream().await;
            let mut bytes: Vec<u8> = (0..length).map(|_| rand::random()).collect();
            bytes[0] = 1;
            write(&mut stream, &bytes).await;
            assert_eq!(node.refusal().await.why, KeyFailure::WrongKey, "{listen}");
            node.handle.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webrtc_address_stays_the_same_with_its_certificate() {
    let certificate = generate_certificate().unwrap();
    let mut hashes = Vec::new();
    for pem in [Some(certificate.clone()), Some(certificate), None] {
        let node = node_with(Options {
            listen: vec![LISTEN[3].parse().unwrap()],
            webrtc_certificate: pem,
            ..Options::new([5; 32])
        })
        .await;
        let text = node.address.to_string();
        hashes.push(text.split_once("/certhash/").unwrap().1.to_owned());
        node.handle.shutdown().await;
    }
    assert_eq!(hashes[0], hashes[1]);
    assert_ne!(hashes[0], hashes[2]);
}
