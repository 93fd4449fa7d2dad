//! Transports over real loopback sockets: a shard comes over each of them, and the
//! addresses that a node reports are right. Every wait is for a state, with a time-out
//! that is far longer than that takes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use doppler_mesh::{Address, Mesh, MeshHandle, MeshOptions, SwarmKey, Timing, Transport};
use doppler_store::verified::{self, Encoded, Outboard};
use doppler_store::{ByteRange, ModelId, ReadError, ReadRequest, ShardId, ShardServe, ShardSource};
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::Rng;
use tokio::sync::watch;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

const LISTEN: [(Transport, &str); 4] = [
    (Transport::Quic, "/ip4/127.0.0.1/udp/0/quic-v1"),
    (Transport::Tcp, "/ip4/127.0.0.1/tcp/0"),
    (Transport::WebSocket, "/ip4/127.0.0.1/tcp/0/ws"),
    (Transport::WebRtc, "/ip4/127.0.0.1/udp/0/webrtc-direct"),
];

/// The transports by which nodes dial each other.
const NATIVE: [Transport; 3] = [Transport::Quic, Transport::Tcp, Transport::WebSocket];

/// One object in memory, or none.
struct One(Option<(Bytes, Outboard)>, watch::Sender<u64>);

impl One {
    fn of(object: Option<&Bytes>) -> Arc<Self> {
        let held = object.map(|object| (object.clone(), Outboard::of(object).unwrap()));
        Arc::new(Self(held, watch::Sender::new(0)))
    }
}

impl ShardServe for One {
    fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> BoxFuture<'_, Result<Encoded, ReadError>> {
        let held = self.0.as_ref().filter(|(data, _)| ShardId::of(data) == shard);
        let encoded = match held {
            Some((data, outboard)) => Ok(verified::encode(data, outboard, range).unwrap()),
            None => Err(ReadError::NotFound { shard, waited: Duration::ZERO }),
        };
        async move { encoded }.boxed()
    }

    fn complete(&self) -> Vec<ShardId> {
        self.0.iter().map(|(data, _)| ShardId::of(data)).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.1.subscribe()
    }
}

fn random(bytes: usize) -> Bytes {
    let mut data = vec![0; bytes];
    rand::rng().fill_bytes(&mut data);
    data.into()
}

fn listening(transports: &[Transport]) -> Vec<Address> {
    let chosen = LISTEN.iter().filter(|(transport, _)| transports.contains(transport));
    chosen.map(|(_, text)| text.parse().unwrap()).collect()
}

fn options(listen: &[Transport], bootstrap: Vec<Address>) -> MeshOptions {
    let mut options = MeshOptions::new("transports", rand::random());
    options.listen = listening(listen);
    options.bootstrap = bootstrap;
    options.find_timeout = PATIENCE;
    options.timing = Timing {
        announce_every: Duration::from_millis(500),
        settle: Duration::from_millis(20),
        ..Timing::default()
    };
    options
}

async fn start(options: MeshOptions, object: Option<&Bytes>) -> MeshHandle {
    Mesh::start(options, One::of(object)).await.unwrap()
}

/// Fetches an object as if it were its model's manifest, which needs no object list.
async fn fetch(node: &MeshHandle, object: &Bytes) -> Result<Bytes, ReadError> {
    let whole = ByteRange::new(0, object.len() as u64).unwrap();
    let read = node.fetch(ReadRequest::token(ShardId::of(object), whole));
    let read = tokio::time::timeout(PATIENCE, read).await.expect("an answer");
    read.map(|range| range.bytes().clone())
}

fn hold(node: &MeshHandle, object: &Bytes) {
    node.register_model(ModelId::of(object), Vec::new()).unwrap();
}

fn remotes(node: &MeshHandle) -> Vec<Transport> {
    let first = |addresses: Vec<String>| addresses[0].parse::<Address>().unwrap().transport();
    node.peers().into_iter().map(|peer| first(peer.addresses)).collect()
}

/// Waits until the mesh's state satisfies `done`.
async fn until(what: &str, node: &MeshHandle, done: impl Fn(&MeshHandle) -> bool) {
    let mut changes = node.watch_changes();
    let wait = async {
        while !done(node) {
            changes.changed().await.unwrap();
            changes.borrow_and_update();
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited for: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_comes_over_each_transport() {
    for transport in NATIVE {
        let object = random(3 * 1024 * 1024 + 19);
        let holder = start(options(&[transport], Vec::new()), Some(&object)).await;
        hold(&holder, &object);
        let addresses = holder.listen_addrs();
        assert!(!addresses.is_empty() && addresses.iter().all(|a| a.transport() == transport));
        let reader = start(options(&[], addresses), None).await;
        assert_eq!(fetch(&reader, &object).await.unwrap(), object, "{transport:?}");
        assert_eq!(remotes(&reader), [transport]);
        assert!(holder.stats().counts.served_bytes > object.len() as u64);
        for node in [reader, holder] {
            node.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_lists_the_addresses_that_browsers_can_dial() {
    let mut options = options(&LISTEN.map(|(transport, _)| transport), Vec::new());
    options.external = vec!["/dns4/node.example/tcp/443/wss".parse().unwrap()];
    let node = start(options, None).await;
    let own = format!("/p2p/{}", node.peer_id());
    let all = node.listen_addrs();
    assert_eq!(all.len(), 5, "{all:?}");
    assert!(all.iter().all(|address| address.to_string().ends_with(&own)));
    let browsers: Vec<String> = node.browser_addrs().iter().map(ToString::to_string).collect();
    assert_eq!(browsers.len(), 3, "{browsers:?}");
    assert!(browsers.contains(&format!("/dns4/node.example/tcp/443/wss{own}")));
    assert!(browsers.iter().any(|text| text.contains("/ws/p2p/")));
    assert!(browsers.iter().any(|text| text.contains("/webrtc-direct/certhash/")));
    assert!(browsers.iter().all(|text| !text.contains("/0/")), "{browsers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_is_preferred_and_tcp_is_used_where_udp_is_blocked() {
    let object = random(200_003);
    let holder = start(options(&NATIVE, Vec::new()), Some(&object)).await;
    hold(&holder, &object);
    let reader = start(options(&[], holder.listen_addrs()), None).await;
    assert_eq!(fetch(&reader, &object).await.unwrap(), object);
    assert_eq!(remotes(&reader), [Transport::Quic]);

    // A port that never answers.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let dead = format!("/ip4/127.0.0.1/udp/{port}/quic-v1/p2p/{}", holder.peer_id());
    let mut addresses = holder.listen_addrs();
    addresses.retain(|address| address.transport() == Transport::Tcp);
    addresses.push(dead.parse().unwrap());
    let reader = start(options(&[], addresses), None).await;
    assert_eq!(fetch(&reader, &object).await.unwrap(), object);
    assert_eq!(remotes(&reader), [Transport::Tcp]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_swarm_is_one_on_each_transport() {
    let (ours, theirs) = (SwarmKey::generate(), SwarmKey::generate());
    for transport in NATIVE {
        let object = random(100_019);
        let private = |key: Option<&SwarmKey>, listen: &[Transport], bootstrap| {
            let mut options = options(listen, bootstrap);
            options.swarm_key = key.cloned();
            options.find_timeout = Duration::from_millis(300);
            options
        };
        for (holder_key, reader_key) in [
            (Some(&ours), None),
            (None, Some(&ours)),
            (Some(&ours), Some(&theirs)),
            (Some(&ours), Some(&ours)),
            (None, None),
        ] {
            let may = holder_key.map(SwarmKey::as_bytes) == reader_key.map(SwarmKey::as_bytes);
            let case = format!("{transport:?}, {}, {}", holder_key.is_some(), reader_key.is_some());
            let holder = private(holder_key, &[transport], Vec::new());
            let holder = start(holder, Some(&object)).await;
            hold(&holder, &object);
            let reader = private(reader_key, &[], holder.listen_addrs());
            let reader = start(reader, None).await;
            if may {
                until(&case, &reader, |node| !node.holders(ShardId::of(&object)).is_empty()).await;
                assert_eq!(fetch(&reader, &object).await.unwrap(), object, "{case}");
                assert_eq!(reader.stats().counts.refused_peers, 0);
            } else {
                // Both sides notice, unless the one without a key was never asked for it.
                until(&case, &reader, |node| node.stats().counts.refused_peers > 0).await;
                if holder_key.is_some() {
                    until(&case, &holder, |node| node.stats().counts.refused_peers > 0).await;
                }
                assert_eq!(fetch(&reader, &object).await.unwrap_err().label(), "not_found");
                assert!(reader.holders(ShardId::of(&object)).is_empty(), "{case}");
                for (node, key) in [(&holder, holder_key), (&reader, reader_key)] {
                    assert!(key.is_none() || node.peers().is_empty(), "{case}");
                    assert_eq!(node.stats().counts.verified_bytes, 0);
                    assert_eq!(node.stats().counts.served_bytes, 0);
                }
            }
            for node in [reader, holder] {
                node.shutdown().await;
            }
        }
    }
}
