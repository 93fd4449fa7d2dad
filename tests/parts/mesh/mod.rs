//! The mesh over real loopback sockets: what nodes tell each other, what they
//! fetch from each other, and how they handle peers that lie, stall or die.
//!
//! No test sleeps: every wait is for a watch to show a state, with a time-out that
//! is far longer than that takes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use doppler_mesh::wire::{Envelope, Holdings, ModelHoldings, ShardReply, ShardRequest, Stamp};
use doppler_mesh::{
    Mesh, MeshHandle, MeshOptions, PROTOCOL_VERSION, PeerId, SHARD_PROTOCOL, Timing, topic,
};
use doppler_store::signature::SignedModel;
use doppler_store::verified::{self, Encoded, GROUP_BYTES, Outboard, SERVE_BYTES_MAX};
use doppler_store::{
    ByteRange, ModelId, Priority, ReadError, ReadRequest, ShardId, ShardServe, ShardSource,
};
use doppler_swarm::{IncomingStreams, Options, Stream, SwarmEvents, SwarmHandle};
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

mod crowds;
mod hostile;
mod relayed;
mod transfer;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a fake provider answers requests.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Honest,
    /// Flips one bit in this byte of the encoding.
    Flip(usize),
    /// Answers so many requests and never answers the others.
    HangAfter(u64),
    /// Claims that objects are this many bytes longer; their first parts are still valid.
    Longer(u64),
}

/// Objects in memory.
struct Memory {
    objects: Mutex<HashMap<ShardId, (Bytes, Outboard)>>,
    manner: Manner,
    changes: watch::Sender<u64>,
    asked: watch::Sender<u64>,
    ranges: Mutex<Vec<ByteRange>>,
}

impl Memory {
    fn new(manner: Manner, objects: &[Bytes]) -> Arc<Self> {
        let this = Self {
            objects: Mutex::default(),
            manner,
            changes: watch::Sender::new(0),
            asked: watch::Sender::new(0),
            ranges: Mutex::default(),
        };
        for object in objects {
            this.put(object);
        }
        Arc::new(this)
    }

    fn put(&self, object: &Bytes) {
        let outboard = Outboard::of(object).unwrap();
        let entry = (object.clone(), outboard);
        self.objects.lock().unwrap().insert(ShardId::of(object), entry);
        self.changes.send_modify(|version| *version += 1);
    }
}

impl ShardServe for Memory {
    fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> BoxFuture<'_, Result<Encoded, ReadError>> {
        async move {
            self.ranges.lock().unwrap().push(range);
            let mut asked = 0;
            self.asked.send_modify(|count| {
                *count += 1;
                asked = *count;
            });
            let object = self.objects.lock().unwrap().get(&shard).cloned();
            let waited = Duration::ZERO;
            let (data, outboard) = object.ok_or(ReadError::NotFound { shard, waited })?;
            let size = data.len() as u64;
            let encoded = verified::encode(&data, &outboard, range)
                .map_err(|_| ReadError::OutOfRange { shard, range, size })?;
            match self.manner {
                Manner::Honest => Ok(encoded),
                Manner::Flip(at) => {
                    let mut bytes = BytesMut::from(&encoded.bytes[..]);
                    bytes[at] ^= 1;
                    Ok(Encoded { size, bytes: bytes.freeze() })
                }
                Manner::Longer(by) => Ok(Encoded { size: size + by, ..encoded }),
                Manner::HangAfter(count) if asked <= count => Ok(encoded),
                Manner::HangAfter(_) => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn complete(&self) -> Vec<ShardId> {
        self.objects.lock().unwrap().keys().copied().collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

/// A model of random objects: its manifest, and its shards in order.
struct Model {
    id: ModelId,
    manifest: Bytes,
    shards: Vec<Bytes>,
}

impl Model {
    fn random(sizes: &[usize]) -> Self {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut object = |size: usize| {
            let mut bytes = vec![0; size];
            rng.fill_bytes(&mut bytes);
            Bytes::from(bytes)
        };
        let manifest = object(1234);
        let shards = sizes.iter().map(|size| object(*size)).collect();
        Self { id: ModelId::of(&manifest), manifest, shards }
    }

    fn list(&self) -> Vec<ShardId> {
        self.shards.iter().map(|shard| ShardId::of(shard)).collect()
    }

    fn all(&self) -> Vec<Bytes> {
        self.shards.iter().chain([&self.manifest]).cloned().collect()
    }

    fn signed(&self, seed: [u8; 32]) -> SignedModel {
        SignedModel::sign(&seed, self.id, "random", self.manifest.len() as u64).unwrap()
    }
}

fn options(name: &str, bootstrap: &[&MeshHandle]) -> MeshOptions {
    let mut options = MeshOptions::new(name, rand::random());
    options.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    options.bootstrap = bootstrap.iter().flat_map(|node| node.listen_addrs()).collect();
    options.find_timeout = PATIENCE;
    options.timing = Timing {
        announce_every: Duration::from_millis(500),
        settle: Duration::from_millis(20),
        ..Timing::default()
    };
    options
}

async fn node(name: &str, bootstrap: &[&MeshHandle], serve: Arc<Memory>) -> MeshHandle {
    Mesh::start(options(name, bootstrap), serve).await.unwrap()
}

fn nothing() -> Arc<Memory> {
    Memory::new(Manner::Honest, &[])
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn read(shard: ShardId, range: ByteRange) -> ReadRequest {
    ReadRequest::token(shard, range)
}

fn whole(object: &Bytes) -> ReadRequest {
    read(ShardId::of(object), range(0, object.len() as u64))
}

/// Waits until the mesh's state satisfies `done`.
async fn until(what: &str, node: &MeshHandle, done: impl Fn(&MeshHandle) -> bool) {
    let mut changes = node.watch_changes();
    let wait = async {
        loop {
            changes.borrow_and_update();
            if done(node) {
                return;
            }
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited for: {what}"));
}

async fn learn(node: &MeshHandle, model: ModelId) -> SignedModel {
    let mut models = node.watch_models();
    let known = models.wait_for(|models| models.iter().any(|known| known.model == model));
    let known = tokio::time::timeout(PATIENCE, known).await.expect("announcement").unwrap();
    known.iter().find(|known| known.model == model).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_learns_a_model_and_fetches_verified_bytes() {
    let model = Model::random(&[100_003, 5 * 1024 * 1024 + 17, 1]);
    let publisher = [7; 32];
    let holder = node("one", &[], Memory::new(Manner::Honest, &model.all())).await;
    holder.register_model(model.id, model.list()).unwrap();
    holder.publish(model.signed(publisher)).unwrap();

    let reader = node("one", &[&holder], nothing()).await;
    let signed = learn(&reader, model.id).await;
    assert_eq!(signed, model.signed(publisher));

    // Fetching the manifest needs no object list; fetching its shards does.
    let manifest = reader.fetch(whole(&model.manifest)).await.unwrap();
    assert_eq!(manifest.bytes(), &model.manifest);
    assert_eq!(reader.models()[0].holders, 1);
    reader.register_model(model.id, model.list()).unwrap();
    let mut expected = model.manifest.len() as u64;
    for shard in &model.shards {
        let part = reader.fetch(whole(shard)).await.unwrap();
        assert_eq!((part.bytes(), part.size()), (shard, shard.len() as u64));
        assert!(part.proves_size());
        expected += shard.len() as u64;
    }
    // A range within groups comes as whole groups.
    let shard = &model.shards[1];
    let part = reader.fetch(read(ShardId::of(shard), range(GROUP_BYTES + 5, 3 * GROUP_BYTES - 1)));
    let part = part.await.unwrap();
    assert_eq!(part.range(), range(GROUP_BYTES, 3 * GROUP_BYTES));
    assert_eq!(part.bytes()[..], shard[GROUP_BYTES as usize..3 * GROUP_BYTES as usize]);
    expected += part.range().len();

    let stats = reader.stats();
    assert_eq!((stats.counts.verified_bytes, stats.counts.rejected_bytes), (expected, 0));
    assert_eq!(stats.peers[&holder.peer_id().to_string()].bytes_in, expected);
    let peers = reader.peers();
    assert_eq!((peers.len(), peers[0].id, peers[0].bytes_in), (1, holder.peer_id(), expected));
    assert_eq!(peers[0].shards_held, 4);
    assert!(peers[0].agent.starts_with("doppler-node/") && peers[0].score > 0.5);
    assert!(holder.stats().counts.served_bytes > expected, "the proof is sent too");
    for node in [reader, holder] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_a_holder_and_follows_its_holdings() {
    let model = Model::random(&[70_000]);
    let store = Memory::new(Manner::Honest, std::slice::from_ref(&model.manifest));
    let holder = node("late", &[], store.clone()).await;
    holder.register_model(model.id, model.list()).unwrap();
    let reader = node("late", &[&holder], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    until("the manifest's holder", &reader, |n| !n.holders(model.id.manifest()).is_empty()).await;
    assert!(reader.holders(ShardId::of(&model.shards[0])).is_empty());

    let fetcher = reader.clone();
    let request = whole(&model.shards[0]);
    let fetch = tokio::spawn(async move { fetcher.fetch(request).await });
    store.put(&model.shards[0]);
    let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap().unwrap();
    assert_eq!(part.bytes(), &model.shards[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_refused_within_a_group_and_another_peer_answers() {
    let model = Model::random(&[3 * 1024 * 1024 + 5]);
    let flip_at = 700_001;
    let liar = node("flip", &[], Memory::new(Manner::Flip(flip_at), &model.all())).await;
    liar.register_model(model.id, model.list()).unwrap();
    let reader = node("flip", &[&liar], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    until("the liar's holdings", &reader, |n| n.holders(shard) == [liar.peer_id()]).await;

    let fetcher = reader.clone();
    let request = whole(&model.shards[0]);
    let fetch = tokio::spawn(async move { fetcher.fetch(request).await });
    // Nobody else holds it, so the liar is asked, detected and banned.
    until("the ban", &reader, |node| node.stats().counts.bans == 1).await;
    until("the liar's disconnection", &reader, |node| node.peers().is_empty()).await;
    assert!(reader.holders(shard).is_empty());
    let stats = reader.stats();
    let rejected = stats.counts.rejected_bytes;
    assert_eq!((stats.banned, stats.counts.verified_bytes), (1, 0));
    assert_eq!(stats.peers[&liar.peer_id().to_string()].rejected, rejected);
    assert!(rejected > flip_at as u64 && rejected <= flip_at as u64 + GROUP_BYTES, "{rejected}");

    // With a third node that has it, the same read succeeds.
    let honest = node("flip", &[&reader], Memory::new(Manner::Honest, &model.all())).await;
    honest.register_model(model.id, model.list()).unwrap();
    let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap().unwrap();
    assert_eq!(part.bytes(), &model.shards[0]);
    let stats = reader.stats();
    assert_eq!(stats.counts.rejected_bytes, rejected, "asked once");
    let from_honest = stats.peers[&honest.peer_id().to_string()].bytes_in;
    assert_eq!(from_honest, model.shards[0].len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_without_another_holder_are_reported_as_corrupt() {
    let model = Model::random(&[50_000]);
    let liar = node("corrupt", &[], Memory::new(Manner::Flip(20_000), &model.all())).await;
    liar.register_model(model.id, model.list()).unwrap();
    let mut options = options("corrupt", &[&liar]);
    options.find_timeout = Duration::from_secs(2);
    let reader = Mesh::start(options, nothing()).await.unwrap();
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    until("the liar's holdings", &reader, |node| !node.holders(shard).is_empty()).await;
    let error = reader.fetch(whole(&model.shards[0])).await.unwrap_err();
    assert_eq!(error.label(), "corrupt", "{error}");
    assert!(error.to_string().contains(&liar.peer_id().to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lies_about_the_size_is_detected() {
    // Objects of 7 MiB and 7 MiB + 16 KiB have the same first 4 MiB subtree, but different ends.
    let model = Model::random(&[7 * 1024 * 1024]);
    let liar = node("size", &[], Memory::new(Manner::Longer(GROUP_BYTES), &model.all())).await;
    let honest = node("size", &[], Memory::new(Manner::Honest, &model.all())).await;
    let reader = node("size", &[&liar, &honest], nothing()).await;
    for node in [&liar, &honest, &reader] {
        node.register_model(model.id, model.list()).unwrap();
    }
    let shard = ShardId::of(&model.shards[0]);
    until("both holdings", &reader, |node| node.holders(shard).len() == 2).await;
    for _ in 0..20 {
        let part = reader.fetch(whole(&model.shards[0])).await.unwrap();
        assert_eq!((part.bytes(), part.size()), (&model.shards[0], 7 * 1024 * 1024));
    }
    assert_eq!(reader.stats().counts.bans, 1);
    assert!(reader.peers().iter().any(|peer| peer.id == honest.peer_id()));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_handle_stops_the_node() {
    let first = node("dropped", &[], nothing()).await;
    let second = node("dropped", &[&first], nothing()).await;
    until("the connection", &first, |node| node.peers().len() == 1).await;
    drop(second);
    until("the disconnection", &first, |node| node.peers().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_mid_fetch_is_replaced() {
    // Three wire requests, of which the first holder answers one before it hangs.
    let model = Model::random(&[12 * 1024 * 1024]);
    let dying_store = Memory::new(Manner::HangAfter(1), &model.all());
    let dying = node("dies", &[], dying_store.clone()).await;
    dying.register_model(model.id, model.list()).unwrap();
    let mut patient = options("dies", &[&dying]);
    // Only the holder's death may end the wait, not its silence.
    patient.timing.idle = PATIENCE;
    let reader = Mesh::start(patient, nothing()).await.unwrap();
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    until("its holdings", &reader, |node| !node.holders(shard).is_empty()).await;

    let fetcher = reader.clone();
    let request = whole(&model.shards[0]);
    let fetch = tokio::spawn(async move { fetcher.fetch(request).await });
    let mut asked = dying_store.asked.subscribe();
    let asked_twice = asked.wait_for(|asked| *asked >= 2);
    tokio::time::timeout(PATIENCE, asked_twice).await.unwrap().unwrap();
    until("the first piece", &reader, |n| n.stats().counts.verified_bytes >= SERVE_BYTES_MAX).await;

    let second = node("dies", &[&reader], Memory::new(Manner::Honest, &model.all())).await;
    second.register_model(model.id, model.list()).unwrap();
    until("the second holder", &reader, |node| node.holders(shard).len() == 2).await;
    let dead = dying.peer_id();
    dying.shutdown().await;
    drop(dying);
    let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap().unwrap();
    assert_eq!(part.bytes(), &model.shards[0]);
    let stats = reader.stats();
    assert_eq!(stats.peers[&dead.to_string()].bytes_in, SERVE_BYTES_MAX, "what it sent counts");
    assert_eq!(stats.peers[&second.peer_id().to_string()].bytes_in, 2 * SERVE_BYTES_MAX);
    until("its disconnection", &reader, |n| n.peers().iter().all(|p| p.id != dead)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_abandoned() {
    let model = Model::random(&[50_000]);
    let silent = node("silent", &[], Memory::new(Manner::HangAfter(0), &model.all())).await;
    silent.register_model(model.id, model.list()).unwrap();
    let mut options = options("silent", &[&silent]);
    options.timing.idle = Duration::from_millis(300);
    let reader = Mesh::start(options, nothing()).await.unwrap();
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    until("its holdings", &reader, |node| !node.holders(shard).is_empty()).await;
    let deadline = Some(Instant::now() + Duration::from_secs(2));
    let error =
        reader.fetch(ReadRequest { deadline, ..whole(&model.shards[0]) }).await.unwrap_err();
    assert_eq!(error.label(), "deadline", "{error}");
    let peers = reader.peers();
    assert!(peers[0].score < 0.5, "stalls count: {}", peers[0].score);
    assert_eq!(reader.stats().counts.bans, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_is_not_found_after_the_given_time() {
    let holder = node("nobody", &[], nothing()).await;
    let mut options = options("nobody", &[&holder]);
    options.find_timeout = Duration::from_millis(700);
    let reader = Mesh::start(options, nothing()).await.unwrap();
    let shard = ShardId::of(b"nobody has this");
    let started = Instant::now();
    let error = reader.fetch(read(shard, range(0, 10))).await.unwrap_err();
    let ReadError::NotFound { shard: named, waited } = error else { panic!("{error}") };
    assert_eq!(named, shard);
    assert!(waited >= Duration::from_millis(700) && waited <= started.elapsed(), "{waited:?}");
    // A nearer deadline ends the search earlier.
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let request = ReadRequest { deadline, ..read(shard, range(0, 10)) };
    let error = reader.fetch(request).await.unwrap_err();
    let ReadError::NotFound { waited, .. } = error else { panic!("{error}") };
    assert!(waited >= Duration::from_millis(50) && waited < Duration::from_millis(700));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_outside_the_object_is_an_error_that_names_its_size() {
    let model = Model::random(&[5000]);
    let holder = node("outside", &[], Memory::new(Manner::Honest, &model.all())).await;
    holder.register_model(model.id, model.list()).unwrap();
    let mut options = options("outside", &[&holder]);
    options.find_timeout = Duration::from_secs(2);
    let reader = Mesh::start(options, nothing()).await.unwrap();
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    let deadline = Some(Instant::now() + Duration::from_secs(3));
    let request = ReadRequest { deadline, ..read(shard, range(0, 5001)) };
    let error = reader.fetch(request).await.unwrap_err();
    assert!(matches!(error, ReadError::OutOfRange { size: 5000, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_swarms_on_one_network_do_not_mix() {
    let (red, blue) = (Model::random(&[10]), Model::random(&[11]));
    let red_1 = node("red", &[], Memory::new(Manner::Honest, &red.all())).await;
    let blue_1 = node("blue", &[&red_1], Memory::new(Manner::Honest, &blue.all())).await;
    let red_2 = node("red", &[&red_1, &blue_1], nothing()).await;
    let blue_2 = node("blue", &[&red_1, &blue_1], nothing()).await;
    let all = [&red_1, &blue_1, &red_2, &blue_2];
    for node in [&red_2, &blue_2] {
        until("both bootstraps", node, |node| node.peers().len() >= 2).await;
    }
    for node in all {
        node.register_model(red.id, red.list()).unwrap();
        node.register_model(blue.id, blue.list()).unwrap();
    }
    red_1.publish(red.signed([1; 32])).unwrap();
    blue_1.publish(blue.signed([2; 32])).unwrap();
    learn(&red_2, red.id).await;
    learn(&blue_2, blue.id).await;
    until("red holdings", &red_2, |node| !node.holders(ShardId::of(&red.shards[0])).is_empty())
        .await;
    let blue_held = ShardId::of(&blue.shards[0]);
    until("blue holdings", &blue_2, |node| !node.holders(blue_held).is_empty()).await;
    for (node, own) in [(&red_1, &red), (&red_2, &red), (&blue_1, &blue), (&blue_2, &blue)] {
        let known: Vec<ModelId> = node.models().iter().map(|known| known.signed.model).collect();
        assert_eq!(known, [own.id]);
        let other = if own.id == red.id { &blue } else { &red };
        assert!(node.holders(ShardId::of(&other.shards[0])).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn holders_learned_by_gossip_are_dialled_and_ranges_come_from_several() {
    let model = Model::random(&[8 * 1024 * 1024, 8 * 1024 * 1024 + 1]);
    // The hub has no shards; the holders and the reader know only the hub.
    let hub = node("spread", &[], nothing()).await;
    let mut holders = Vec::new();
    for _ in 0..3 {
        let holder = node("spread", &[&hub], Memory::new(Manner::Honest, &model.all())).await;
        holder.register_model(model.id, model.list()).unwrap();
        holders.push(holder);
    }
    let reader = node("spread", &[&hub], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    until("every holder connected", &reader, |node| {
        let peers = node.peers();
        holders.iter().all(|holder| peers.iter().any(|peer| peer.id == holder.peer_id()))
    })
    .await;
    let shard = ShardId::of(&model.shards[0]);
    until("all holdings", &reader, |node| node.holders(shard).len() == 3).await;
    let reads = model.shards.iter().map(|shard| reader.fetch(whole(shard)));
    for (part, shard) in futures::future::join_all(reads).await.into_iter().zip(&model.shards) {
        assert_eq!(part.unwrap().bytes(), shard);
    }
    let stats = reader.stats();
    let bytes: Vec<u64> = holders
        .iter()
        .map(|holder| stats.peers.get(&holder.peer_id().to_string()).map_or(0, |t| t.bytes_in))
        .collect();
    println!("bytes from each of three holders: {bytes:?}");
    assert_eq!(bytes.iter().sum::<u64>(), 16 * 1024 * 1024 + 1);
    assert!(bytes.iter().filter(|bytes| **bytes > 0).count() >= 2, "{bytes:?}");
}

/// A peer that speaks the protocols by hand, to send what no honest node would.
struct Rogue {
    swarm: SwarmHandle,
    events: SwarmEvents,
    incoming: IncomingStreams,
    topic: String,
}

impl Rogue {
    async fn join(name: &str, node: &MeshHandle) -> Self {
        let topic = topic(name).unwrap();
        let (swarm, events) = SwarmHandle::spawn(Options {
            bootstrap: node.listen_addrs(),
            agent: "rogue/1".into(),
            protocol_version: PROTOCOL_VERSION.into(),
            topics: vec![topic.clone()],
            ..Options::new(rand::random())
        })
        .await
        .unwrap();
        let incoming = swarm.accept(SHARD_PROTOCOL).unwrap();
        Self { swarm, events, incoming, topic }
    }

    fn say(&self, envelope: &Envelope) {
        self.swarm.publish(&self.topic, envelope.encode()).unwrap();
    }

    fn holdings(&self, peer: PeerId, model: &Model) -> Envelope {
        Envelope::Holdings(Holdings {
            peer: peer.to_bytes(),
            stamp: Stamp { epoch: 1, sequence: 1 },
            lease: Duration::from_secs(60),
            next: Duration::ZERO,
            room: 0,
            is_leaving: false,
            addresses: Vec::new(),
            models: vec![ModelHoldings {
                model: model.id,
                manifest: true,
                objects: vec![1],
                parts: Vec::new(),
                helps: false,
                hot: Vec::new(),
                pins: false,
            }],
            run: 0,
        })
    }

    /// Takes the next stream and its request.
    async fn asked(&mut self) -> (Stream, ShardRequest) {
        let incoming = tokio::time::timeout(PATIENCE, self.incoming.recv()).await;
        let mut stream = incoming.expect("asked").unwrap().stream;
        let mut frame = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut frame).await.unwrap();
        (stream, ShardRequest::decode(&frame).unwrap())
    }

    /// Takes the next stream and its request, and answers with these bytes.
    async fn answer(&mut self, answer: &[u8]) -> ShardRequest {
        let (mut stream, request) = self.asked().await;
        // The reader hangs up as soon as it has seen enough. Close instead of
        // dropping, so that what was written arrives.
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
        request
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_announcements_and_holdings_of_others_are_dropped_and_counted() {
    let model = Model::random(&[10]);
    let honest = node("forged", &[], Memory::new(Manner::Honest, &model.all())).await;
    let reader = node("forged", &[&honest], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let rogue = Rogue::join("forged", &reader).await;
    let forged = SignedModel { name: "better".into(), ..model.signed([1; 32]) };
    rogue.say(&Envelope::Announcement(forged));
    until("the count", &reader, |node| node.stats().counts.bad_signatures >= 1).await;
    rogue.say(&rogue.holdings(honest.peer_id(), &model));
    until("the count", &reader, |node| node.stats().counts.bad_messages >= 1).await;
    rogue.swarm.publish(&rogue.topic, vec![0xff; 100]).unwrap();
    until("the count", &reader, |node| node.stats().counts.bad_messages >= 2).await;
    assert!(reader.models().is_empty());
    assert!(reader.holders(model.id.manifest()).is_empty());
    // The honest announcement still gets through.
    honest.register_model(model.id, model.list()).unwrap();
    honest.publish(model.signed([1; 32])).unwrap();
    assert_eq!(learn(&reader, model.id).await.name, "random");
    assert_eq!(honest.stats().counts.bad_signatures, 0, "not passed on");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_replies_cost_score_and_the_read_goes_on() {
    let model = Model::random(&[40_000]);
    let object = &model.shards[0];
    let encoded = {
        let outboard = Outboard::of(object).unwrap();
        verified::encode(object, &outboard, range(0, object.len() as u64)).unwrap()
    };
    let (object_size, body_bytes) = (encoded.size, encoded.bytes.len() as u64);
    let reply = |reply: ShardReply, body: &[u8]| [&reply.encode()[..], body].concat();
    let ok = ShardReply::Ok { object_size, body_bytes };
    let longer = ShardReply::Ok { object_size, body_bytes: body_bytes + 1 };
    let shorter = ShardReply::Ok { object_size, body_bytes: body_bytes - 1 };
    let smaller = ShardReply::Ok { object_size: object_size - 1, body_bytes };
    let answers = [
        (0.4, reply(ok, &encoded.bytes[..30_000])), // ends early
        (0.2, reply(longer, &[&encoded.bytes[..], &[0]].concat())),
        (0.2, reply(shorter, &encoded.bytes)),
        (0.2, reply(smaller, &encoded.bytes)),
        (0.2, vec![0xff, 0xff, 1, 2, 3]), // a frame of 65,535 bytes
        (0.2, vec![0, 3, 0xff, 0xff, 0xff]),
        (0.45, reply(ShardReply::NotFound, &[])),
        (0.5, reply(ShardReply::Overloaded, &[])),
        (0.5, reply(ShardReply::Failed, &[])),
        (0.5, reply(ShardReply::Relayed, &[])), // although the connection is direct
    ];
    for (index, (score_max, answer)) in answers.into_iter().enumerate() {
        let reader = node("broken", &[], nothing()).await;
        reader.register_model(model.id, model.list()).unwrap();
        let mut rogue = Rogue::join("broken", &reader).await;
        rogue.say(&rogue.holdings(rogue.swarm.peer(), &model));
        let fetcher = reader.clone();
        let request = whole(object);
        let fetch = tokio::spawn(async move { fetcher.fetch(request).await });
        let request = rogue.answer(&answer).await;
        assert_eq!((request.shard, request.priority), (ShardId::of(object), Priority::Token));
        let rogue_id = rogue.swarm.peer();
        let judged = |node: &MeshHandle| {
            let peers = node.peers();
            peers.iter().any(|peer| peer.id == rogue_id && peer.score <= score_max)
        };
        until(&format!("answer {index} to be judged"), &reader, judged).await;
        let honest = node("broken", &[&reader], Memory::new(Manner::Honest, &model.all())).await;
        honest.register_model(model.id, model.list()).unwrap();
        // The rogue may be asked again; it stays silent and leaves.
        rogue.swarm.shutdown().await;
        let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap();
        assert_eq!(part.unwrap_or_else(|e| panic!("answer {index}: {e}")).bytes(), object);
        assert_eq!(reader.stats().counts.bans, 0);
        drop(rogue.events);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_its_caller_gives_up_leaves_nothing() {
    let node = node("given up", &[], nothing()).await;
    let waits = node.clone();
    let absent = read(ShardId::of(b"absent"), range(0, 10));
    let waiting = tokio::spawn(async move { waits.fetch(absent).await });
    until("the read", &node, |node| node.stats().load.reads == 1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    until("its end", &node, |node| node.stats().load.reads == 0).await;
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_frees_the_port_and_ends_what_waits() {
    let first = node("stop", &[], nothing()).await;
    let address = first.listen_addrs()[0].clone();
    let other = node("stop", &[&first], nothing()).await;
    until("the connection", &first, |node| node.peers().len() == 1).await;
    let waits = first.clone();
    let absent = read(ShardId::of(b"absent"), range(0, 10));
    let waiting = tokio::spawn(async move { waits.fetch(absent).await });
    until("the read", &first, |node| node.stats().load.reads == 1).await;
    let stopped = Instant::now();
    first.shutdown().await;
    let ended = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    let ended = ended.err();
    assert!(matches!(ended, Some(ReadError::Overloaded(_))), "{ended:?}");
    assert!(stopped.elapsed() < PATIENCE / 2, "it is not waited for");
    assert!(first.fetch(absent).await.is_err(), "nor does another begin");
    first.shutdown().await;
    until("the disconnection", &other, |node| node.peers().is_empty()).await;
    let mut options = options("stop", &[]);
    options.listen = vec![address.without_peer()];
    let again = Mesh::start(options.clone(), nothing()).await.unwrap();
    // The port is taken now, which is a clear error.
    options.seed = rand::random();
    let Err(taken) = Mesh::start(options, nothing()).await else { panic!("two on one port") };
    assert!(taken.to_string().contains("cannot listen on /ip4/127.0.0.1/tcp/"), "{taken}");
    // The other node keeps dialling its bootstrap address. A different node answers
    // there now, so the id in the address does not match, and nobody is connected.
    assert!(again.peers().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loopback_transfer_is_fast() {
    let mut rng = SmallRng::seed_from_u64(rand::random());
    let mut bytes = vec![0u8; 64 * 1024 * 1024];
    rng.fill_bytes(&mut bytes);
    let size = rng.random_range(bytes.len() - 9..bytes.len());
    bytes.truncate(size);
    let shards = vec![Bytes::from(bytes)];
    let manifest = Bytes::from_static(b"manifest");
    let model = Model { id: ModelId::of(&manifest), manifest, shards };
    let holder = node("fast", &[], Memory::new(Manner::Honest, &model.all())).await;
    holder.register_model(model.id, model.list()).unwrap();
    let reader = node("fast", &[&holder], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let shard = ShardId::of(&model.shards[0]);
    until("its holdings", &reader, |node| !node.holders(shard).is_empty()).await;
    for _ in 0..3 {
        let started = Instant::now();
        let part = reader.fetch(whole(&model.shards[0])).await.unwrap();
        let seconds = started.elapsed().as_secs_f64();
        assert_eq!(part.bytes(), &model.shards[0]);
        println!("64 MiB verified over loopback: {:.0} MB/s", size as f64 / 1e6 / seconds);
    }
}
