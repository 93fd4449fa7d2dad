//! Real swarms on lines that fail: what they learn, fetch and keep. No test sleeps; every wait is for
//! a state, with a time-out that is far longer than that takes.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::time::Duration;

use bytes::Bytes;
use doppler_ids::{PeerId, ShardId};
use doppler_mesh::{SwarmKey, Timing};
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt, future};

use super::fleet::{Fleet, FleetOptions, Model, Node};
use super::network::{Lines, Network, address_of};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn options(nodes: usize) -> FleetOptions {
    let timing = Timing {
        announce_every: Duration::from_millis(500),
        lease: Duration::from_secs(4),
        settle: Duration::from_millis(20),
        ..Timing::default()
    };
    let lines = Lines { loss_percent: 1, ..Lines::new(1) };
    FleetOptions { nodes, lines, timing, swarm_key: None }
}

fn knows(model: &Model) -> impl Fn(&Node) -> bool {
    let id = model.id;
    move |node| node.mesh.models().iter().any(|known| known.signed.model == id)
}

async fn read(node: &Node, object: &Bytes) {
    let read = node.read(ShardId::of(object), object.len());
    let read = tokio::time::timeout(PATIENCE, read).await.expect("the read ends");
    assert_eq!(read.expect("somebody has it"), object);
}

/// Every ninth of the objects in three nodes beside the publisher, so that each has four holders.
fn share(model: &Model, node: usize) -> impl Iterator<Item = &Bytes> {
    let objects = model.objects.iter().enumerate();
    objects.filter(move |(at, _)| (at + node).is_multiple_of(3)).map(|(_, object)| object)
}

async fn read_all(fleet: &Fleet, which: impl Fn(usize) -> Vec<Bytes>) {
    let reads = fleet.up().map(|(at, node)| {
        let objects = which(at);
        async move {
            for object in &objects {
                read(node, object).await;
            }
        }
    });
    future::join_all(reads).await;
}

fn held_by(fleet: &Fleet, model: &Model, nodes: &[usize]) -> BTreeMap<usize, Vec<PeerId>> {
    let first = ShardId::of(&model.objects[0]);
    let holders = |at: usize| (at, fleet.node(at).mesh.holders(first));
    nodes.iter().map(|at| holders(*at)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_real_swarms_survive_cuts_and_deaths_and_lose_nothing() {
    let mut fleet = Fleet::start(options(10)).await.unwrap();
    let sizes: Vec<usize> = (0..18).map(|at| 30_011 + at * 13_007).collect();
    let model = Model::random(1, &sizes);
    fleet.publish(0, &model).await.unwrap();
    assert!(fleet.until(PATIENCE, knows(&model)).await, "everybody learns of the model");
    read_all(&fleet, |at| if at == 0 { Vec::new() } else { share(&model, at).cloned().collect() })
        .await;
    let ids = model.ids();
    let spread = |node: &Node| ids.iter().all(|shard| node.mesh.holders(*shard).len() >= 3);
    assert!(fleet.until(PATIENCE, spread).await, "everybody knows the holders");

    // Five cannot reach the other five. Each side has every object and goes on; neither hears the other.
    let (left, right) = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]);
    let across = |one: usize, other: usize| (one < 5) != (other < 5);
    fleet.network.cut(across);
    fleet.network.tear(across);
    let news = Model::random(2, &[50_021, 70_001]);
    fleet.publish(0, &news).await.unwrap();
    assert!(fleet.until_at(&left, PATIENCE, knows(&news)).await, "its own side learns of it");
    read(fleet.node(9), &model.objects[2]).await;
    read(fleet.node(4), &model.objects[1]).await;
    assert!(right.iter().all(|at| !knows(&news)(fleet.node(*at))), "nothing crosses the cut");
    fleet.network.mend();
    assert!(fleet.until(PATIENCE, knows(&news)).await, "the news crosses once the cut has ended");
    read(fleet.node(9), &news.objects[0]).await;

    // A node that hears nobody, though all hear it, reads on once it hears again.
    fleet.network.cut(|_, to| to == 8);
    let late = future::join(read(fleet.node(8), &news.objects[1]), async {
        read(fleet.node(7), &news.objects[1]).await;
        fleet.network.mend();
    });
    late.await;

    // A bit that flips on the line costs a connection, and no byte.
    let flips = async {
        while !(0..10).any(|from| fleet.network.flip(from, 5)) {
            tokio::task::yield_now().await;
        }
    };
    future::join(read(fleet.node(5), &model.objects[17]), flips).await;

    // Three die at once, the publisher among them. What they held is with the others.
    let held = fleet.node(3).whole();
    let dead = [0, 3, 6];
    let peers = dead.map(|at| fleet.node(at).mesh.peer_id());
    fleet.kill(&dead).await;
    read_all(&fleet, |_| model.objects.clone()).await;
    let alone = |node: &Node| {
        let holders = ids.iter().flat_map(|shard| node.mesh.holders(*shard));
        holders.into_iter().all(|holder| !peers.contains(&holder))
    };
    assert!(fleet.until(PATIENCE, alone).await, "nobody counts on the dead");

    // One comes back with its data: it fetches nothing, and is counted on again.
    fleet.boot(3).await.unwrap();
    let first = held.iter().find(|shard| ids.contains(shard)).copied().unwrap();
    let back = |node: &Node| node.mesh.holders(first).contains(&peers[1]);
    let others = [1, 2, 4, 5, 7, 8, 9];
    let seen = fleet.until_at(&others, PATIENCE, back).await;
    assert!(seen, "{:?}", held_by(&fleet, &model, &others));
    assert!(fleet.node(3).whole().is_superset(&held));
    assert_eq!(fleet.node(3).mesh.stats().counts.verified_bytes, 0);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_swarm_is_one_on_carried_lines() {
    let key = SwarmKey::generate();
    let fleet = Fleet::start(FleetOptions { swarm_key: Some(key), ..options(3) }).await.unwrap();
    let model = Model::random(3, &[20_000]);
    fleet.publish(1, &model).await.unwrap();
    assert!(fleet.until(PATIENCE, knows(&model)).await);
    read(fleet.node(2), &model.objects[0]).await;
    assert!(fleet.network.bytes(1).sent > 20_000);
    fleet.stop().await;
}

#[tokio::test]
async fn lines_are_cut_torn_and_refused_as_told() {
    let network = Network::new(2, Lines::new(1));
    let (one, two) = (network.carrier(0), network.carrier(1));
    let (address, mut arrivals) = two.listen(&address_of(1).with_port(0)).unwrap();
    assert_eq!(address, address_of(1));
    assert_eq!(two.listen(&address).err().unwrap().kind(), ErrorKind::AddrInUse);
    assert_eq!(two.listen(&address_of(0)).err().unwrap().kind(), ErrorKind::AddrNotAvailable);

    // A dial waits for the end of a cut, in whichever direction.
    network.cut(|from, _| from == 1);
    let (near, far) = future::join(one.dial(address.clone()), async {
        network.mend();
        arrivals.next().await.unwrap()
    })
    .await;
    let (mut near, mut far) = (near.unwrap(), far.stream);
    near.write_all(b"there").await.unwrap();
    let mut got = [0; 5];
    far.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"there");
    assert_eq!((network.bytes(0).sent, network.bytes(1).received), (5, 5));

    // What is sent into a cut arrives after it, in order.
    network.cut(|from, _| from == 1);
    far.write_all(b"ba").await.unwrap();
    far.write_all(b"ck").await.unwrap();
    let mut got = [0; 4];
    assert!(future::poll_immediate(near.read_exact(&mut got)).await.is_none());
    let read = future::join(near.read_exact(&mut got), async { network.mend() });
    read.await.0.unwrap();
    assert_eq!(&got, b"back");

    // A flipped bit arrives flipped; a farewell comes after what was said.
    near.write_all(&[8]).await.unwrap();
    assert!(network.flip(0, 1));
    near.close().await.unwrap();
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, [9]);

    network.tear(|_, _| true);
    assert_eq!(near.read(&mut got).await.err().unwrap().kind(), ErrorKind::ConnectionReset);
    assert_eq!(far.write(&got).await.err().unwrap().kind(), ErrorKind::ConnectionReset);
    network.kill(1);
    let refused = one.dial(address.clone()).await.err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    network.revive(1);
    let _arrivals = two.listen(&address).unwrap();
    one.dial(address).await.unwrap();
}
