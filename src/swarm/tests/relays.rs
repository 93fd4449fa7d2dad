//! Relays over real loopback sockets: a reservation is requested automatically, a peer that is
//! reachable only through the relay is reached within its limits, and a stranger gets no
//! reservation. Modes are set explicitly, so AutoNAT's verdicts do not matter.

use std::time::Duration;

use doppler_swarm::{
    Address, Options, Path, PeerId, RelayMode, Stream, SwarmEvents, SwarmHandle, SwarmKey,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const ECHO: &str = "/test/echo/1";

struct Node {
    handle: SwarmHandle,
    events: SwarmEvents,
}

impl Node {
    async fn start(listen: &[&str], bootstrap: &[Address], relay: RelayMode) -> Self {
        Self::with(listen, bootstrap, relay, None).await
    }

    /// Starts a node that echoes streams of `ECHO`.
    async fn with(
        listen: &[&str],
        bootstrap: &[Address],
        relay: RelayMode,
        key: Option<&SwarmKey>,
    ) -> Self {
        let options = Options {
            listen: listen.iter().map(|text| text.parse().unwrap()).collect(),
            bootstrap: bootstrap.to_vec(),
            protocol_version: "/test/1".into(),
            swarm_key: key.cloned(),
            relay,
            ..Options::new(rand::random())
        };
        let (handle, mut events) = SwarmHandle::spawn(options).await.unwrap();
        let count = listen.len();
        wait(&mut events.listening, |addresses| addresses.len() >= count).await;
        let mut incoming = handle.accept(ECHO).unwrap();
        tokio::spawn(async move {
            while let Some(mut incoming) = incoming.recv().await {
                tokio::spawn(async move {
                    while let Ok(byte) = incoming.stream.read_u8().await {
                        if incoming.stream.write_u8(byte).await.is_err()
                            || incoming.stream.flush().await.is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        Self { handle, events }
    }

    fn id(&self) -> PeerId {
        self.handle.peer()
    }

    fn addresses(&self) -> Vec<Address> {
        self.events.listening.borrow().clone()
    }

    /// Waits until it has a reservation at a relay. Returns the circuit's addresses.
    async fn reservation(&mut self) -> Vec<Address> {
        wait(&mut self.events.reach, |reach| !reach.relays.is_empty()).await;
        let circuit = |address: &Address| address.relay().is_some();
        wait(&mut self.events.listening, |all| all.iter().any(circuit)).await;
        self.addresses().into_iter().filter(circuit).collect()
    }

    async fn path_to(&mut self, peer: PeerId) -> Path {
        wait(&mut self.events.peers, |peers| peers.contains_key(&peer)).await;
        self.events.peers.borrow()[&peer].path
    }

    async fn echo(&self, peer: PeerId, bytes: usize) -> (Stream, usize) {
        let mut stream = self.handle.open_stream(peer, ECHO).await.unwrap();
        for count in 0..bytes {
            let mut exchange = async || {
                stream.write_u8(7).await?;
                stream.flush().await?;
                stream.read_u8().await
            };
            match timeout(PATIENCE, exchange()).await.expect("an answer or an end") {
                Ok(byte) => assert_eq!(byte, 7),
                Err(_) => return (stream, count),
            }
        }
        (stream, bytes)
    }
}

async fn wait<T>(watch: &mut watch::Receiver<T>, done: impl FnMut(&T) -> bool) {
    let waited = timeout(PATIENCE, watch.wait_for(done)).await;
    assert!(matches!(waited, Ok(Ok(_))), "waited in vain for a {}", std::any::type_name::<T>());
}

const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";
const TCP: &str = "/ip4/127.0.0.1/tcp/0";

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_listen_is_reached_through_a_relay() {
    for key in [None, Some(SwarmKey::generate())] {
        for listen in [QUIC, TCP] {
            let key = key.as_ref();
            let relay = Node::with(&[listen], &[], RelayMode::Server, key).await;
            assert!(relay.events.reach.borrow().offers_relay);
            let addresses = relay.addresses();
            let mut hidden = Node::with(&[], &addresses, RelayMode::Client, key).await;
            let circuits = hidden.reservation().await;
            assert_eq!(hidden.events.reach.borrow().relays, [relay.id()]);
            assert!(circuits.iter().all(|circuit| circuit.peer() == Some(hidden.id())));

            // Only the relay listens, so no hole can be punched.
            let mut guest = Node::with(&[], &circuits, RelayMode::Client, key).await;
            let path = guest.path_to(hidden.id()).await;
            assert_eq!(path, Path::Relayed { by: Some(relay.id()) }, "{listen}");
            let (stream, echoed) = guest.echo(hidden.id(), 100).await;
            assert!(stream.is_relayed() && echoed == 100);
            assert!(!hidden.path_to(guest.id()).await.is_direct());
            // Both have a direct connection to the relay itself.
            let (stream, _) = guest.echo(relay.id(), 1).await;
            assert!(!stream.is_relayed());
            for node in [guest, hidden, relay] {
                node.handle.shutdown().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_circuit_ends_at_its_limit() {
    let relay = Node::start(&[QUIC], &[], RelayMode::Server).await;
    let mut hidden = Node::start(&[], &relay.addresses(), RelayMode::Client).await;
    let circuits = hidden.reservation().await;
    let mut guest = Node::start(&[], &circuits, RelayMode::Client).await;
    guest.path_to(hidden.id()).await;
    // 128 KiB in both directions together, much of it the overhead of small frames.
    let (_, echoed) = guest.echo(hidden.id(), 64 * 1024).await;
    assert!(echoed > 0 && echoed < 64 * 1024, "{echoed} bytes were echoed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_listens_is_finally_reached_directly() {
    let key = SwarmKey::generate();
    for (listen, key) in [(QUIC, None), (TCP, None), (QUIC, Some(&key)), (TCP, Some(&key))] {
        let start =
            async |bootstrap: &[Address], mode| Node::with(&[listen], bootstrap, mode, key).await;
        let relay = start(&[], RelayMode::Server).await;
        let mut hidden = start(&relay.addresses(), RelayMode::Client).await;
        let circuits = hidden.reservation().await;
        // It knows only the circuit's address.
        let mut guest = start(&circuits, RelayMode::Client).await;
        let (hidden_id, guest_id) = (hidden.id(), guest.id());
        let direct = |peer: PeerId| {
            move |peers: &doppler_swarm::Peers| {
                peers.get(&peer).is_some_and(|peer| peer.path.is_direct())
            }
        };
        wait(&mut guest.events.peers, direct(hidden_id)).await;
        wait(&mut hidden.events.peers, direct(guest_id)).await;
        let (stream, echoed) = guest.echo(hidden_id, 100).await;
        assert!(!stream.is_relayed() && echoed == 100, "{listen}");
        for node in [guest, hidden] {
            node.handle.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_goes_away_is_replaced() {
    let first = Node::start(&[TCP], &[], RelayMode::Server).await;
    let bootstrap = first.addresses();
    let mut hidden = Node::start(&[], &bootstrap, RelayMode::Client).await;
    hidden.reservation().await;
    let second = Node::start(&[QUIC], &[], RelayMode::Server).await;
    let address = second.addresses();
    hidden.handle.dial(second.id(), address).unwrap();
    wait(&mut hidden.events.reach, |reach| reach.relays.len() == 2).await;
    first.handle.shutdown().await;
    let left = [second.id()];
    wait(&mut hidden.events.reach, |reach| reach.relays == left).await;
    let gone = first.id();
    wait(&mut hidden.events.listening, |all| all.iter().all(|a| a.relay() != Some(gone))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_no_reservation_at_a_private_node() {
    let key = SwarmKey::generate();
    let mut relay = Node::with(&[QUIC], &[], RelayMode::Server, Some(&key)).await;
    let mut member = Node::with(&[], &relay.addresses(), RelayMode::Client, Some(&key)).await;
    let circuits = member.reservation().await;
    for stranger_key in [None, Some(SwarmKey::generate())] {
        let addresses = [relay.addresses(), circuits.clone()].concat();
        let stranger = Node::with(&[], &addresses, RelayMode::Client, stranger_key.as_ref()).await;
        let refused = timeout(PATIENCE, relay.events.refusals.recv()).await.unwrap().unwrap();
        assert_eq!(refused.peer, stranger.id());
        // The member cannot be reached either, because its circuit starts at the relay.
        assert!(stranger.events.reach.borrow().relays.is_empty());
        assert!(!stranger.events.peers.borrow().contains_key(&member.id()));
        assert!(!member.events.peers.borrow().contains_key(&stranger.id()));
        stranger.handle.shutdown().await;
    }
    assert_eq!(relay.events.peers.borrow().len(), 1, "the member");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_relayed_unless_a_relay_is_offered() {
    for mode in [RelayMode::Off, RelayMode::Client, RelayMode::Auto] {
        let node = Node::start(&[QUIC], &[], mode).await;
        let mut other = Node::start(&[], &node.addresses(), RelayMode::Client).await;
        wait(&mut other.events.peers, |peers| {
            peers.values().any(|peer| peer.agent.is_some() && !peer.offers_relay)
        })
        .await;
        assert!(other.events.reach.borrow().relays.is_empty() && other.addresses().is_empty());
    }
}
