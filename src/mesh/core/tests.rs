//! Cores that talk to each other in virtual time. No sockets, no sleeping; the same seed gives the
//! same actions. Peers have rates, fall silent, send wrong bytes, and go away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{ByteRange, ModelId, PeerId, ShardId};
use doppler_store::signature::SignedModel;
use doppler_store::verified::GROUP_BYTES;
use doppler_store::{Priority, ReadRequest};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::limits::{BAN_FIRST, BUSY_MAX, HEARD_EVERY};
use super::*;

mod catalogue;

const MIB: u64 = 1 << 20;
const LATENCY: Duration = Duration::from_millis(10);
const FIND_TIMEOUT: Duration = Duration::from_secs(30);

/// How a node answers.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Manner {
    Honest,
    /// Sends nothing from here on.
    SilentFrom(Instant),
    /// Its answers do not match their hash.
    Wrong,
    /// Says that objects are one group longer.
    Longer,
    /// Answers that it is busy.
    Busy,
}

/// A request whose answer is on its way.
#[derive(Clone, Copy)]
struct Reply {
    from: usize,
    range: ByteRange,
    begins: Instant,
    ends: Instant,
    /// Nothing more of it comes from then on.
    silent_from: Option<Instant>,
}

/// The requests of one node, and their progress.
#[derive(Default)]
struct Replies {
    now: Option<Instant>,
    under_way: BTreeMap<(ReadId, RequestId), Reply>,
}

impl Reply {
    fn proved(&self, now: Instant) -> u64 {
        let now = self.silent_from.map_or(now, |silent| silent.min(now));
        if now >= self.ends {
            return self.range.end();
        }
        let whole = (self.ends - self.begins).as_secs_f64();
        let share = now.saturating_duration_since(self.begins).as_secs_f64() / whole;
        let groups = (self.range.len() as f64 * share) as u64 / GROUP_BYTES;
        if groups == 0 { 0 } else { self.range.start() + groups * GROUP_BYTES }
    }
}

impl Sight for Replies {
    fn proved(&self, read: ReadId, request: RequestId) -> u64 {
        let reply = self.under_way.get(&(read, request));
        reply.zip(self.now).map_or(0, |(reply, now)| reply.proved(now))
    }

    fn is_throttled(&self, _: Instant) -> bool {
        false
    }
}

struct Node {
    id: PeerId,
    core: Core,
    sizes: BTreeMap<ShardId, u64>,
    manner: Manner,
    /// Bytes a second, and until when it is busy.
    rate: f64,
    busy_until: Instant,
    replies: Replies,
    kept: BTreeMap<(ReadId, RequestId), ByteRange>,
    ended: BTreeMap<ReadId, (Instant, Result<(), String>)>,
    learned: Vec<ModelId>,
    asked: Vec<(Instant, Ask)>,
    banned: Vec<PeerId>,
}

/// What happens to a node next.
enum Next {
    Tell(Event),
    Arrive(ReadId, RequestId),
    /// The node that asked has waited long enough.
    GiveUp(ReadId, RequestId),
    Disconnect(usize),
    Wake,
}

struct World {
    start: Instant,
    now: Instant,
    nodes: Vec<Node>,
    links: BTreeSet<(usize, usize)>,
    queue: BTreeMap<(Instant, u64), (usize, Next)>,
    sequence: u64,
    log: Vec<String>,
    /// The last holdings that each node said.
    said: Vec<Vec<u8>>,
}

impl World {
    /// Nodes with these rates, all connected to each other.
    fn new(start: Instant, rates: &[f64]) -> Self {
        let mut world = Self {
            start,
            now: start,
            nodes: Vec::new(),
            links: BTreeSet::new(),
            queue: BTreeMap::new(),
            sequence: 0,
            log: Vec::new(),
            said: vec![Vec::new(); rates.len()],
        };
        for (index, rate) in rates.iter().enumerate() {
            let id = PeerId::from_seed([index as u8 + 1; 32]);
            let timing = Timing::default();
            let (topic, find_timeout) = ("t".to_owned(), FIND_TIMEOUT);
            let config = Config { own: id, run: 1, epoch: 1, topic, timing, find_timeout };
            world.nodes.push(Node {
                id,
                core: Core::new(config, start),
                sizes: BTreeMap::new(),
                manner: Manner::Honest,
                rate: *rate,
                busy_until: start,
                replies: Replies::default(),
                kept: BTreeMap::new(),
                ended: BTreeMap::new(),
                learned: Vec::new(),
                asked: Vec::new(),
                banned: Vec::new(),
            });
            let address = format!("/ip4/10.0.0.{}/tcp/1", index + 1).parse().unwrap();
            world.tell(index, Event::Addresses(vec![address]));
        }
        for one in 0..rates.len() {
            for other in 0..one {
                world.connect(one, other);
            }
        }
        world
    }

    fn at(&mut self, at: Instant, node: usize, next: Next) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), (node, next));
    }

    fn index(&self, peer: PeerId) -> usize {
        self.nodes.iter().position(|node| node.id == peer).unwrap()
    }

    fn connect(&mut self, one: usize, other: usize) {
        self.links.extend([(one, other), (other, one)]);
        self.tell_contacts(one);
        self.tell_contacts(other);
    }

    fn disconnect(&mut self, one: usize, other: usize) {
        self.links.remove(&(one, other));
        self.links.remove(&(other, one));
        self.tell_contacts(one);
        self.tell_contacts(other);
        for (node, gone) in [(one, other), (other, one)] {
            let lost = self.nodes[node].replies.under_way.iter();
            let lost: Vec<_> =
                lost.filter(|(_, reply)| reply.from == gone).map(|(key, _)| *key).collect();
            for key in lost {
                self.answer(node, key, Some(FailureKind::Lost));
            }
        }
    }

    fn tell_contacts(&mut self, node: usize) {
        let others = self.links.iter().filter(|(from, _)| *from == node);
        let contact =
            Contact { is_direct: true, listens: true, reached: Vec::new(), topics: Vec::new() };
        let contacts = others.map(|(_, other)| (self.nodes[*other].id, contact.clone())).collect();
        self.tell(node, Event::Contacts(contacts));
    }

    /// The node holds these objects whole, and knows the model that lists them.
    fn hold(&mut self, node: usize, model: &Model, objects: &[ShardId]) {
        self.register(node, model);
        self.nodes[node].sizes.extend(objects.iter().map(|object| (*object, model.size)));
        let whole = self.nodes[node].sizes.keys().copied().collect();
        self.tell(node, Event::Whole(whole));
    }

    fn register(&mut self, node: usize, model: &Model) {
        let objects = model.objects.clone();
        self.tell(node, Event::Register { model: model.id, objects });
    }

    fn read(&mut self, node: usize, read: ReadId, shard: ShardId, bytes: u64) {
        let range = ByteRange::new(0, bytes).unwrap();
        let (priority, deadline) = (Priority::Bulk, None);
        let request = ReadRequest { shard, range, priority, deadline };
        self.tell(node, Event::Read { read, request });
    }

    fn tell(&mut self, node: usize, event: Event) {
        let now = self.now;
        let this = &mut self.nodes[node];
        this.replies.now = Some(now);
        let actions = this.core.on(now, event, &this.replies);
        let wake = this.core.next_wake();
        assert!(wake > now || actions.len() < 10_000, "it never comes to rest");
        self.at(wake.max(now), node, Next::Wake);
        for action in actions {
            self.log.push(format!("{:?} {node} {action:?}", now - self.start));
            self.perform(node, action);
        }
    }

    fn perform(&mut self, node: usize, action: Action) {
        let now = self.now;
        match action {
            Action::Publish(data) => {
                let author = self.nodes[node].id;
                if matches!(Envelope::decode(&data), Ok(Envelope::Holdings(_))) {
                    self.said[node].clone_from(&data);
                }
                let others: Vec<usize> =
                    self.links.iter().filter(|(from, _)| *from == node).map(|l| l.1).collect();
                for other in others {
                    let (topic, word) = ("t".into(), data.clone().into());
                    let event = Event::Gossip { message: self.sequence, topic, author, word };
                    self.at(now + LATENCY, other, Next::Tell(event));
                }
            }
            Action::Judge { is_sound, .. } => assert!(is_sound, "everybody speaks properly"),
            Action::Dial { peer, .. } => {
                let other = self.index(peer);
                assert!(!self.links.contains(&(node, other)), "it is connected");
                // Nobody answers; a node that went away stays away.
            }
            Action::Ban { peer, .. } => {
                self.nodes[node].banned.push(peer);
                let other = self.index(peer);
                self.at(now, node, Next::Disconnect(other));
            }
            Action::ForgetStreams(_) | Action::Changed => {}
            Action::Warn(_) | Action::TellTwins(_) => panic!("nobody has a twin"),
            Action::Join { .. } | Action::Leave(_) | Action::Tell { .. } => {
                panic!("a small swarm has one topic")
            }
            Action::Ask { ask, .. } => self.ask(node, ask),
            Action::Keep { read, request, end } => {
                let (_, ask) = *self.nodes[node]
                    .asked
                    .iter()
                    .find(|(_, ask)| (ask.read, ask.request) == (read, request))
                    .unwrap();
                let range = ByteRange::new(ask.range.start(), end).unwrap();
                self.nodes[node].kept.insert((read, request), range);
            }
            Action::Stop { read, request } => {
                self.answer(node, (read, request), Some(FailureKind::Stopped));
            }
            Action::Abandon { read, request } => {
                self.nodes[node].replies.under_way.remove(&(read, request));
            }
            Action::Discard { read, request } => {
                assert!(self.nodes[node].kept.remove(&(read, request)).is_some());
            }
            Action::End { read, result } => {
                let result = result.map_err(|error| error.to_string());
                let again = self.nodes[node].ended.insert(read, (now, result));
                assert!(again.is_none(), "a read ends once");
            }
            Action::Learned { signed, .. } => self.nodes[node].learned.push(signed.model),
            Action::Forgot(model) => self.nodes[node].learned.retain(|known| *known != model),
            Action::Refuse(refused) => panic!("{refused}"),
        }
    }

    fn ask(&mut self, node: usize, ask: Ask) {
        let now = self.now;
        let from = self.index(ask.peer);
        assert!(self.links.contains(&(node, from)), "asked of somebody who is not there");
        self.nodes[node].asked.push((now, ask));
        let server = &mut self.nodes[from];
        let begins = server.busy_until.max(now + LATENCY);
        let ends = begins + Duration::from_secs_f64(ask.range.len() as f64 / server.rate);
        server.busy_until = ends;
        let reply = Reply { from, range: ask.range, begins, ends, silent_from: None };
        let key = (ask.read, ask.request);
        self.nodes[node].replies.under_way.insert(key, reply);
        let mut heard = begins + HEARD_EVERY;
        while heard < ends {
            self.at(heard, node, Next::Arrive(ask.read, ask.request));
            heard += HEARD_EVERY;
        }
        self.at(ends, node, Next::Arrive(ask.read, ask.request));
    }

    /// Bytes of a reply arrive; at its end, all of them.
    fn arrive(&mut self, node: usize, key: (ReadId, RequestId)) {
        let Some(reply) = self.nodes[node].replies.under_way.get(&key).copied() else { return };
        let server = &self.nodes[reply.from];
        let size = server.sizes.values().next().copied().unwrap_or_default();
        match server.manner {
            _ if reply.silent_from.is_some() => {}
            Manner::SilentFrom(at) if self.now >= at => {
                let silent = Reply { silent_from: Some(at), ..reply };
                self.nodes[node].replies.under_way.insert(key, silent);
                self.at(at + Timing::default().idle, node, Next::GiveUp(key.0, key.1));
            }
            Manner::Longer if reply.range.end() >= size => {
                self.answer(node, key, Some(FailureKind::Wrong));
            }
            Manner::Wrong => self.answer(node, key, Some(FailureKind::Wrong)),
            Manner::Busy => self.answer(node, key, Some(FailureKind::Overloaded)),
            _ if self.now >= reply.ends => self.answer(node, key, None),
            _ => {
                let peer = server.id;
                self.tell(node, Event::Heard { peer });
            }
        }
    }

    fn answer(&mut self, node: usize, key: (ReadId, RequestId), failure: Option<FailureKind>) {
        let Some(reply) = self.nodes[node].replies.under_way.remove(&key) else { return };
        let shard = self.nodes[reply.from].sizes.values().next().copied();
        let size = shard.unwrap_or(reply.range.end());
        let lie = if self.nodes[reply.from].manner == Manner::Longer { GROUP_BYTES } else { 0 };
        let end = reply.proved(self.now).min(size);
        let is_kept = failure.is_none_or(FailureKind::keeps);
        let proved =
            (end > reply.range.start() && is_kept).then_some(Proved { end, size: size + lie });
        let outcome = match failure {
            None => Ok(()),
            Some(kind) => Err(Failure { kind, bytes: GROUP_BYTES, detail: "failed".into() }),
        };
        let (peer, answer) = (self.nodes[reply.from].id, Answer { outcome, proved });
        self.tell(node, Event::Answered { read: key.0, request: key.1, peer, answer });
    }

    /// Runs until `done`, or panics after an hour.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        let limit = self.now + Duration::from_secs(3600);
        while !done(self) {
            let ((at, _), (node, next)) = self.queue.pop_first().expect("somebody will wake");
            assert!(at < limit, "not done within an hour");
            self.now = self.now.max(at);
            match next {
                Next::Tell(event) => self.tell(node, event),
                Next::Arrive(read, request) => self.arrive(node, (read, request)),
                Next::GiveUp(read, request) => {
                    self.answer(node, (read, request), Some(FailureKind::Stalled));
                }
                Next::Disconnect(other) => self.disconnect(node, other),
                Next::Wake if self.nodes[node].core.next_wake() <= self.now => {
                    self.tell(node, Event::Time);
                }
                Next::Wake => {}
            }
        }
    }

    fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        self.at(until, 0, Next::Wake);
        self.run_until(|world| world.now >= until);
    }

    fn run_read(&mut self, node: usize, read: ReadId) -> Result<(), String> {
        self.run_until(|world| world.nodes[node].ended.contains_key(&read));
        self.nodes[node].ended[&read].1.clone()
    }

    /// Asserts that what was kept of a read is exactly its range, each byte once.
    fn assert_whole(&self, node: usize, read: ReadId, bytes: u64) {
        let kept = self.nodes[node].kept.iter().filter(|((of, _), _)| *of == read);
        let mut ranges: Vec<ByteRange> = kept.map(|(_, range)| *range).collect();
        ranges.sort_by_key(ByteRange::start);
        let mut end = 0;
        for range in ranges {
            assert_eq!(range.start(), end);
            end = range.end();
        }
        assert_eq!(end, bytes);
    }
}

/// A model of objects of one size.
struct Model {
    id: ModelId,
    objects: Vec<ShardId>,
    size: u64,
}

impl Model {
    fn new(objects: u8, size: u64) -> Self {
        let objects = (0..objects).map(|index| ShardId::of(&[index])).collect();
        Self { id: ModelId::of(b"model"), objects, size }
    }

    fn signed(&self) -> SignedModel {
        SignedModel::sign(&[9; 32], self.id, "model", 1000).unwrap()
    }
}

#[test]
fn a_model_is_announced_learned_found_and_fetched() {
    let mut world = World::new(Instant::now(), &[50e6, 50e6]);
    let model = Model::new(2, 24 * MIB - 5);
    world.hold(0, &model, &model.objects);
    world.tell(0, Event::Publish(model.signed()));
    world.run_until(|world| !world.nodes[1].learned.is_empty());
    assert!(world.now - world.start < Duration::from_secs(1), "said once it has settled");
    world.read(1, 7, model.objects[0], model.size);
    // Its holder is known, but not the meaning of the bitmap, so nobody is asked yet.
    assert!(world.nodes[1].asked.is_empty());
    world.register(1, &model);
    assert_eq!(world.run_read(1, 7), Ok(()));
    world.assert_whole(1, 7, model.size);
    let seconds = (world.now - world.start).as_secs_f64();
    assert!(seconds < 2.0, "{seconds}: 25 MB at 50 MB/s");
    let (core, other) = (&world.nodes[1].core, world.nodes[0].id);
    assert_eq!(core.counts().verified_bytes, model.size);
    assert_eq!(core.standing(world.now, other).traffic.bytes_in, model.size);
    assert_eq!(core.load(), Load { streams: 0, leases: 1, reads: 0 });
}

#[test]
fn a_stall_is_noticed_and_another_peer_goes_on() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6, 40e6]);
    let model = Model::new(1, 48 * MIB);
    for node in 0..2 {
        world.hold(node, &model, &model.objects);
    }
    world.register(2, &model);
    world.run_for(Duration::from_secs(2));
    let silent_from = world.now + Duration::from_millis(300);
    world.nodes[0].manner = Manner::SilentFrom(silent_from);
    world.read(2, 1, model.objects[0], model.size);
    let began = world.now;
    assert_eq!(world.run_read(2, 1), Ok(()));
    world.assert_whole(2, 1, model.size);
    let seconds = (world.now - began).as_secs_f64();
    assert!(seconds < 48.0 * MIB as f64 / 40e6 + 1.0, "{seconds}: one peer alone, and a second");
    let node = &world.nodes[2];
    let score = |index: usize| node.core.standing(world.now, world.nodes[index].id).score;
    assert!(score(0) < 0.5 && score(1) > 0.5, "{} and {}", score(0), score(1));
    assert!(node.core.counts().hedges > 0);
}

#[test]
fn a_wrong_byte_bans_until_the_ban_is_over() {
    let mut world = World::new(Instant::now(), &[40e6, 10e6, 40e6]);
    let model = Model::new(2, 16 * MIB);
    for node in 0..2 {
        world.hold(node, &model, &model.objects);
    }
    world.register(2, &model);
    world.nodes[0].manner = Manner::Wrong;
    world.run_for(Duration::from_secs(2));
    world.read(2, 1, model.objects[0], model.size);
    assert_eq!(world.run_read(2, 1), Ok(()));
    world.assert_whole(2, 1, model.size);
    let liar = world.nodes[0].id;
    assert_eq!(world.nodes[2].banned, [liar], "once");
    let core = &world.nodes[2].core;
    assert_eq!((core.counts().bans, core.banned(world.now)), (1, 1));
    assert!(core.counts().rejected_bytes > 0);
    assert_eq!(core.holders(world.now, model.objects[1]).ready.len(), 1);
    // It is connected again and honest, but not asked until its ban is over.
    world.nodes[0].manner = Manner::Honest;
    world.connect(0, 2);
    let asked = world.nodes[2].asked.len();
    world.read(2, 2, model.objects[1], model.size);
    assert_eq!(world.run_read(2, 2), Ok(()));
    let new = &world.nodes[2].asked[asked..];
    assert!(!new.is_empty() && new.iter().all(|(_, ask)| ask.peer != liar));
    world.run_for(BAN_FIRST + Timing::default().announce_every);
    assert_eq!(world.nodes[2].core.banned(world.now), 0);
    let ready = world.nodes[2].core.holders(world.now, model.objects[1]).ready;
    assert_eq!(ready.len(), 2, "believed again");
}

#[test]
fn a_lie_about_the_size_is_disproved_by_the_last_part() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6, 40e6]);
    let model = Model::new(1, 16 * MIB + 5);
    for node in 0..2 {
        world.hold(node, &model, &model.objects);
    }
    world.register(2, &model);
    world.nodes[0].manner = Manner::Longer;
    world.run_for(Duration::from_secs(2));
    world.read(2, 1, model.objects[0], model.size);
    let end = world.run_read(2, 1);
    let liar = world.nodes[0].id;
    let lied = world.nodes[2].asked.iter().filter(|(_, ask)| ask.peer == liar).count();
    assert!(lied > 0, "it was asked");
    assert_eq!(end, Ok(()));
    world.assert_whole(2, 1, model.size);
    assert_eq!(world.nodes[2].banned, [liar]);
}

#[test]
fn holdings_end_with_their_lease_and_a_read_with_its_patience() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6]);
    let model = Model::new(1, MIB);
    world.hold(0, &model, &model.objects);
    world.register(1, &model);
    world.run_for(Duration::from_secs(15));
    let shard = model.objects[0];
    assert_eq!(world.nodes[1].core.holders(world.now, shard).ready.len(), 1);
    world.disconnect(0, 1);
    let holders = |world: &World| world.nodes[1].core.holders(world.now, shard);
    assert_eq!((holders(&world).ready.len(), holders(&world).away.len()), (0, 1));
    let lease = Timing::default().lease;
    world.run_for(lease - Timing::default().announce_every - Duration::from_secs(1));
    assert_eq!(holders(&world).away.len(), 1, "its lease runs");
    world.run_for(Timing::default().announce_every + Duration::from_secs(2));
    assert_eq!(holders(&world), Holders::default());
    assert_eq!(world.nodes[1].core.load().leases, 0);
    let began = world.now;
    world.read(1, 1, shard, MIB);
    let end = world.run_read(1, 1).unwrap_err();
    assert!(end.contains("nobody has it") && end.contains("30.0 s"), "{end}");
    assert_eq!(world.now - began, FIND_TIMEOUT, "to the instant");
    // A read that its caller drops reports nothing more, and one with a deadline ends by then.
    world.read(1, 2, shard, MIB);
    world.tell(1, Event::Dropped { read: 2 });
    let request = ReadRequest {
        deadline: Some(world.now + Duration::from_secs(3)),
        ..ReadRequest::token(shard, ByteRange::new(0, 9).unwrap())
    };
    world.tell(1, Event::Read { read: 3, request });
    let began = world.now;
    assert!(world.run_read(1, 3).is_err());
    assert_eq!(world.now - began, Duration::from_secs(3));
    assert!(!world.nodes[1].ended.contains_key(&2));
    assert_eq!(world.nodes[1].core.load().reads, 0);
}

#[test]
fn who_leaves_or_is_missing_is_no_holder_and_offers_are_heard() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6, 40e6]);
    let model = Model::new(1, MIB);
    for node in 0..2 {
        world.hold(node, &model, &model.objects);
    }
    world.register(2, &model);
    let offer = |room, is_leaving| Event::Offer(Offer { room, is_leaving });
    world.tell(1, offer(5 * MIB, false));
    world.run_for(Duration::from_secs(12));
    let object = (model.objects[0], MIB);
    let holders = |world: &World, since| {
        let core = &world.nodes[2].core;
        core.kept(world.now, object, Replicas::default(), since).holders.len()
    };
    let volunteers = |world: &World| world.nodes[2].core.volunteers(world.now);
    assert_eq!(holders(&world, None), 2);
    assert_eq!(volunteers(&world), [(world.nodes[1].id, 5 * MIB)]);
    world.tell(1, offer(5 * MIB, true));
    world.run_for(Duration::from_secs(1));
    assert_eq!((holders(&world, None), volunteers(&world).len()), (1, 0));
    assert_eq!(holders(&world, Some(world.now)), 0, "nobody has spoken since");
    let asked = world.now;
    world.run_for(Duration::from_secs(11));
    assert_eq!(holders(&world, Some(asked)), 1);
    // Its lease runs, but it is disconnected and silent.
    world.disconnect(0, 2);
    world.run_for(Duration::from_secs(3));
    assert_eq!(holders(&world, None), 1);
    world.run_for(Duration::from_secs(4));
    assert_eq!(holders(&world, None), 0);
    assert_eq!(world.nodes[2].core.holders(world.now, object.0).away.len(), 1);
}

#[test]
fn a_lost_peer_counts_for_those_that_hear_it_and_speaks_at_once_when_it_is_doubted() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6, 40e6]);
    let model = Model::new(1, MIB);
    for node in 0..3 {
        world.hold(node, &model, &model.objects);
    }
    world.run_for(Duration::from_secs(12));
    let counts =
        |world: &World, node: usize| world.nodes[node].core.counts_on(world.now, world.nodes[0].id);
    assert!(counts(&world, 1) && counts(&world, 2));
    // Node 2 loses node 0, and says so to node 1, which still hears it.
    world.disconnect(0, 2);
    for _ in 0..30 {
        world.run_for(Duration::from_secs(1));
        assert!(counts(&world, 1));
    }
    assert!(!counts(&world, 2), "here nobody passes anything on");
    // Node 0 hears of it and speaks at once, but not for each doubt.
    let doubt = || {
        let data = Envelope::Doubt(PeerId::from_seed([1; 32]).to_bytes()).encode();
        let (topic, author) = ("t".into(), PeerId::from_seed([2; 32]));
        Event::Gossip { message: 1, topic, author, word: data.into() }
    };
    world.run_for(Duration::from_millis(300));
    world.tell(0, doubt());
    assert_eq!(world.nodes[0].core.next_wake(), world.now);
    world.run_for(Duration::from_millis(300));
    world.tell(0, doubt());
    assert!(world.nodes[0].core.next_wake() > world.now);
}

#[test]
fn an_old_message_does_not_bring_a_dead_peer_back() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6]);
    let model = Model::new(1, MIB);
    world.hold(0, &model, &model.objects);
    world.register(1, &model);
    world.run_for(Duration::from_secs(2));
    let (author, topic) = (world.nodes[0].id, Arc::from("t"));
    let said = world.said[0].clone();
    world.disconnect(0, 1);
    // A partition: what node 0 says does not come through, and its lease ends.
    world.run_for(Timing::default().lease + Duration::from_secs(3));
    assert_eq!(world.nodes[1].core.load().leases, 0);
    let replay = |topic: &Arc<str>| Event::Gossip {
        message: 1,
        topic: topic.clone(),
        author,
        word: said.clone().into(),
    };
    world.tell(1, replay(&topic));
    assert_eq!(world.nodes[1].core.load().leases, 0, "said before");
    // Connected, it lives, and only its own new word says what it holds.
    world.connect(0, 1);
    world.tell(1, replay(&topic));
    assert_eq!(world.nodes[1].core.load().leases, 0);
    world.run_for(Duration::from_secs(1));
    assert_eq!(world.nodes[1].core.load().leases, 1);
}

#[test]
fn late_is_not_failed() {
    // Three nodes read from one that sends 64 KiB per second.
    let mut world = World::new(Instant::now(), &[65_536.0, 40e6, 40e6, 40e6]);
    let model = Model::new(8, 384 * 1024);
    world.hold(0, &model, &model.objects);
    (1..4).for_each(|node| world.register(node, &model));
    world.run_for(Duration::from_secs(1));
    for node in 1..4 {
        for (read, shard) in (1..).zip(model.objects.clone()) {
            world.read(node, read, shard, model.size);
        }
    }
    let began = world.now;
    world.run_until(|world| world.nodes[1..].iter().all(|node| node.ended.len() == 8));
    for node in 1..4 {
        for read in 1..=8 {
            assert_eq!(world.nodes[node].ended[&read].1, Ok(()), "{node} {read}");
            world.assert_whole(node, read, model.size);
        }
    }
    let seconds = (world.now - began).as_secs_f64();
    let least = 3.0 * 8.0 * model.size as f64 / 65_536.0;
    assert!(seconds > 2.0 * FIND_TIMEOUT.as_secs_f64() && seconds < 1.2 * least, "{seconds}");
}

#[test]
fn a_holder_that_is_only_ever_busy_is_given_up_after_a_while() {
    let mut world = World::new(Instant::now(), &[40e6, 40e6]);
    let model = Model::new(1, MIB);
    world.hold(0, &model, &model.objects);
    world.register(1, &model);
    world.run_for(Duration::from_secs(1));
    world.nodes[0].manner = Manner::Busy;
    world.read(1, 1, model.objects[0], MIB);
    let began = world.now;
    world.run_for(2 * FIND_TIMEOUT);
    assert!(world.nodes[1].ended.is_empty(), "it may have time yet");
    assert!(world.run_read(1, 1).is_err());
    let waited = world.now - began;
    assert!(waited >= BUSY_MAX && waited < BUSY_MAX + Duration::from_secs(1), "{waited:?}");
}

/// A run in which everything goes wrong that can. Returns its log.
fn tumult(start: Instant, seed: u64) -> (Vec<String>, Vec<(ReadId, bool)>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let rates: Vec<f64> = (0..6).map(|_| rng.random_range(2e6..60e6)).collect();
    let mut world = World::new(start, &rates);
    let model = Model::new(8, 8 * MIB);
    for node in 0..5 {
        let objects: Vec<ShardId> =
            model.objects.iter().copied().filter(|_| node == 0 || rng.random()).collect();
        world.hold(node, &model, &objects);
    }
    world.register(5, &model);
    world.tell(0, Event::Publish(model.signed()));
    world.run_for(Duration::from_secs(2));
    for (read, shard) in (1..).zip(model.objects.clone()) {
        world.read(5, read, shard, model.size);
    }
    for _ in 0..30 {
        world.run_for(Duration::from_millis(rng.random_range(1..200)));
        let node = rng.random_range(1..5);
        match rng.random_range(0..6) {
            0 => world.nodes[node].manner = Manner::SilentFrom(world.now),
            1 => world.nodes[node].manner = Manner::Honest,
            2 => world.nodes[node].manner = Manner::Wrong,
            3 if world.links.contains(&(5, node)) => world.disconnect(5, node),
            4 => world.nodes[node].rate = rng.random_range(0.5e6..60e6),
            _ => {}
        }
    }
    world.run_until(|world| world.nodes[5].ended.len() == 8);
    let ended = world.nodes[5].ended.iter();
    let ended: Vec<(ReadId, bool)> =
        ended.map(|(read, (_, result))| (*read, result.is_ok())).collect();
    for (read, _) in ended.iter().filter(|(_, is_whole)| *is_whole) {
        world.assert_whole(5, *read, model.size);
    }
    (world.log, ended)
}

#[test]
fn the_same_seed_gives_the_same_actions_and_every_read_ends() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let start = Instant::now();
    for round in 0..20 {
        let seed = seed.wrapping_add(round);
        let (log, ended) = tumult(start, seed);
        assert!(
            ended.iter().all(|(_, is_whole)| *is_whole),
            "one holder of all is honest: {ended:?}"
        );
        let (again, _) = tumult(start, seed);
        assert_eq!(log.len(), again.len());
        // Compared line by line, so that a failure shows the difference and not two whole logs.
        for (one, other) in log.iter().zip(&again) {
            assert_eq!(one, other);
        }
    }
}
