//! The scheduler under a simulated clock and simulated peers: each has a rate, and
//! may fall silent. No sockets, no sleeping; the same seed, the same run.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::*;

const MIB: u64 = 1 << 20;

fn peer(byte: u8) -> PeerId {
    PeerId::from_seed([byte; 32])
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn read(shard: &[u8], bytes: u64, priority: Priority) -> ReadRequest {
    ReadRequest { shard: ShardId::of(shard), range: range(0, bytes), priority, deadline: None }
}

/// A peer that sends what it was asked for, one request after another.
#[derive(Clone)]
struct Sim {
    rate: f64,
    chunks: Chunks,
    /// Sends nothing from here on.
    silent_from: f64,
    queue: Vec<(Ask, f64)>,
    /// Bytes that it sent in full, wanted or not.
    sent: u64,
}

impl Sim {
    fn new(rate: f64) -> Self {
        Self { rate, chunks: Chunks::ALL, silent_from: f64::MAX, queue: Vec::new(), sent: 0 }
    }
}

struct World {
    start: Instant,
    /// Seconds.
    now: f64,
    scheduler: Scheduler,
    peers: BTreeMap<PeerId, Sim>,
    /// Shards that only some hold; all hold the others.
    only: BTreeMap<ShardId, Vec<PeerId>>,
    /// Requests in the order in which they were made.
    asked: Vec<Ask>,
    delivered: BTreeMap<ReadId, Vec<ByteRange>>,
    beaten: Vec<Beaten>,
}

const TICK: f64 = 0.005;

impl World {
    fn new(rates: &[f64]) -> Self {
        let peers = rates.iter().enumerate();
        Self {
            start: Instant::now(),
            now: 0.0,
            scheduler: Scheduler::default(),
            peers: peers.map(|(index, rate)| (peer(index as u8), Sim::new(*rate))).collect(),
            only: BTreeMap::new(),
            asked: Vec::new(),
            delivered: BTreeMap::new(),
            beaten: Vec::new(),
        }
    }

    fn at(&self) -> Instant {
        self.start + Duration::from_secs_f64(self.now)
    }

    fn assign(&mut self) {
        let now = self.at();
        let Self { scheduler, peers, only, .. } = self;
        let asks = scheduler.schedule(now, true, &|shard| {
            let holds = |peer: &PeerId| only.get(&shard).is_none_or(|all| all.contains(peer));
            let all = peers.iter().filter(|(peer, _)| holds(peer));
            all.map(|(peer, sim)| Holder { peer: *peer, score: 0.5, chunks: sim.chunks }).collect()
        });
        for ask in asks {
            assert!(ask.range.len() <= SERVE_BYTES_MAX);
            assert_eq!(ask.range.start() % GROUP_BYTES, 0);
            let sim = self.peers.get_mut(&ask.peer).unwrap();
            assert!(sim.chunks.cover(ask.range), "it does not hold that");
            sim.queue.push((ask, ask.range.len() as f64));
            assert!(sim.queue.len() <= REQUESTS_PER_PEER_MAX as usize);
            self.asked.push(ask);
        }
        assert!(self.scheduler.twins <= 2 * HEDGES_MAX);
    }

    fn step(&mut self) {
        self.assign();
        self.now += TICK;
        let now = self.at();
        for id in self.peers.keys().copied().collect::<Vec<_>>() {
            let sim = self.peers.get_mut(&id).unwrap();
            if self.now >= sim.silent_from {
                continue;
            }
            let mut may_send = sim.rate * TICK;
            while let Some((ask, left)) = sim.queue.first_mut() {
                self.scheduler.links.heard(now, id);
                if *left > may_send {
                    *left -= may_send;
                    break;
                }
                may_send -= *left;
                let ask = *ask;
                sim.queue.remove(0);
                sim.sent += ask.range.len();
                if !self.scheduler.knows(ask.read, ask.request) {
                    continue;
                }
                let outcome = Outcome::Delivered(ask.range.len());
                let beaten = self.scheduler.end(now, ask.read, ask.request, outcome);
                self.delivered.entry(ask.read).or_default().push(ask.range);
                self.beaten.extend(beaten);
                if let Some(beaten) = beaten {
                    // Its stream is reset.
                    let queue = &mut self.peers.get_mut(&beaten.peer).unwrap().queue;
                    queue.retain(|(ask, _)| ask.request != beaten.request);
                    break;
                }
            }
        }
    }

    /// Runs until these are done; seconds that took.
    fn run(&mut self, reads: &[ReadId]) -> f64 {
        let started = self.now;
        while reads.iter().any(|read| !self.scheduler.is_done(*read)) {
            assert!(self.now < started + 600.0, "not done within ten minutes");
            self.step();
        }
        for id in reads {
            self.scheduler.remove(self.at(), *id);
        }
        self.now - started
    }

    /// That what came for a read is exactly its range, each byte once.
    fn assert_whole(&mut self, read: ReadId, bytes: u64) {
        let parts = self.delivered.get_mut(&read).unwrap();
        parts.sort_by_key(ByteRange::start);
        let mut end = 0;
        for part in parts.iter() {
            assert_eq!(part.start(), end);
            end = part.end();
        }
        assert_eq!(end, bytes);
    }
}

#[test]
fn peers_share_a_read_by_their_rates_and_their_rates_add_up() {
    let mut world = World::new(&[20e6, 20e6, 20e6]);
    let bytes = 64 * MIB - 5;
    let id = world.scheduler.add(read(b"a", bytes, Priority::Bulk)).unwrap();
    let seconds = world.run(&[id]);
    world.assert_whole(id, bytes);
    assert!(bytes as f64 / seconds > 50e6, "{:.1} MB/s", bytes as f64 / 1e6 / seconds);

    let mut world = World::new(&[40e6, 10e6]);
    let ids = [b"a", b"b", b"c"]
        .map(|shard| world.scheduler.add(read(shard, 64 * MIB, Priority::Bulk)).unwrap());
    let seconds = world.run(&ids);
    let rate = 3.0 * 64.0 * MIB as f64 / seconds;
    assert!(rate > 45e6, "{:.1} of 50 MB/s", rate / 1e6);
    let [fast, slow] = [0, 1].map(|index| world.peers[&peer(index)].sent as f64);
    assert!(fast / slow > 3.0 && fast / slow < 6.0, "{:.1} instead of 4", fast / slow);
    // The slow one was asked for less at a time.
    let longest = |index| {
        let all = world.asked.iter().filter(|ask| ask.peer == peer(index));
        all.skip(REQUESTS_UNMEASURED_MAX as usize).map(|ask| ask.range.len()).max().unwrap()
    };
    assert!(longest(1) < longest(0), "{} and {}", longest(1), longest(0));
}

#[test]
fn a_silent_peer_costs_less_than_a_second() {
    let mut world = World::new(&[50e6, 50e6]);
    world.peers.get_mut(&peer(0)).unwrap().silent_from = 0.3;
    let bytes = 64 * MIB;
    let id = world.scheduler.add(read(b"a", bytes, Priority::Token)).unwrap();
    let seconds = world.run(&[id]);
    world.assert_whole(id, bytes);
    let alone = bytes as f64 / 50e6;
    assert!(seconds < alone + 0.8, "{seconds:.2} s, one peer alone takes {alone:.2}");
    assert!(world.beaten.iter().all(|beaten| beaten.peer == peer(0)));
    assert!(world.beaten.iter().any(|beaten| beaten.silent), "it is told who was silent");
    // From a moment after it fell silent it was asked for nothing.
    let after = world.asked.len();
    let id = world.scheduler.add(read(b"b", 4 * MIB, Priority::Token)).unwrap();
    world.run(&[id]);
    let asked = world.asked[after..].iter().filter(|ask| ask.peer == peer(0)).count();
    assert!(asked <= 1, "{asked}");
}

#[test]
fn a_peer_that_slows_down_is_hedged_and_repeats_are_bounded() {
    let mut world = World::new(&[40e6, 40e6]);
    let warm = world.scheduler.add(read(b"warm", 64 * MIB, Priority::Bulk)).unwrap();
    world.run(&[warm]);
    world.peers.get_mut(&peer(0)).unwrap().rate = 0.4e6;
    let started = world.asked.len();
    let token = world.scheduler.add(read(b"t", 4 * MIB, Priority::Token)).unwrap();
    let seconds = world.run(&[token]);
    world.assert_whole(token, 4 * MIB);
    assert!(seconds < 1.0, "{seconds:.2} s; at the slow peer's pace it takes 5");
    assert!(world.asked.len() > started);

    // However often peers are late: repeated bytes stay a share of what was delivered.
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for index in 0..60u32 {
        for sim in world.peers.values_mut() {
            sim.rate = rng.random_range(0.5e6..60e6);
        }
        let priority = if rng.random() { Priority::Token } else { Priority::Bulk };
        let read = read(&index.to_le_bytes(), rng.random_range(1..16 * MIB), priority);
        let id = world.scheduler.add(read).unwrap();
        world.run(&[id]);
        world.assert_whole(id, read.range.end());
    }
    let allowed = HEDGE_BYTES_FREE + (world.scheduler.delivered as f64 * HEDGE_SHARE) as u64;
    assert!(world.scheduler.repeated <= allowed);
    assert!(!world.beaten.is_empty(), "nothing was ever late");
    assert_eq!(world.scheduler.twins, 0);
}

#[test]
fn tokens_come_first_by_deadline_then_begun_shards_then_rare_ones() {
    let mut world = World::new(&[10e6]);
    let add = |world: &mut World, shard: &[u8], priority, deadline: Option<u64>| {
        let deadline = deadline.map(|seconds| world.start + Duration::from_secs(seconds));
        let read = ReadRequest { deadline, ..read(shard, MIB, priority) };
        world.scheduler.add(read).unwrap()
    };
    let begun = add(&mut world, b"begun", Priority::Bulk, None);
    world.run(&[begun]);
    let first_asked = world.asked.len();
    let common = add(&mut world, b"common", Priority::Bulk, None);
    let rare = add(&mut world, b"rare", Priority::Bulk, None);
    let more = add(&mut world, b"begun", Priority::Bulk, None);
    let prefetch = add(&mut world, b"p", Priority::Prefetch, None);
    let patient = add(&mut world, b"t1", Priority::Token, None);
    let late = add(&mut world, b"t2", Priority::Token, Some(9));
    let soon = add(&mut world, b"t3", Priority::Token, Some(3));
    // A second peer, of which nothing comes, holds all but the rare one.
    world.peers.insert(peer(9), Sim { silent_from: 0.0, ..Sim::new(1.0) });
    let rare_shard = ShardId::of(b"rare");
    world.only.insert(rare_shard, vec![peer(0)]);
    // Only its rarity counts: it has failed all of them.
    for id in [common, rare, more, prefetch, patient, late, soon] {
        let read = world.scheduler.reads.get_mut(&id).unwrap();
        let retry = world.start + Duration::from_secs(3600);
        read.failed.insert(peer(9), Failed { retry, wait: RETRY_FIRST });
    }
    world.run(&[common, rare, more, prefetch, patient, late, soon]);
    let mut order: Vec<ReadId> = world.asked[first_asked..].iter().map(|ask| ask.read).collect();
    order.dedup();
    assert_eq!(order, [soon, late, patient, prefetch, more, rare, common]);
}

#[test]
fn what_is_held_in_part_is_asked_only_for_that_part() {
    let mut world = World::new(&[30e6, 30e6]);
    let halves = [Chunks(u64::from(u32::MAX)), Chunks(!u64::from(u32::MAX))];
    for (sim, half) in world.peers.values_mut().zip(halves) {
        sim.chunks = half;
    }
    let id = world.scheduler.add(read(b"a", 64 * MIB, Priority::Bulk)).unwrap();
    let seconds = world.run(&[id]);
    world.assert_whole(id, 64 * MIB);
    assert!(seconds < 1.5, "{seconds:.2} s: both at once take 1.1");
    // The next one has a hole that nobody fills: it waits, and goes on once somebody does.
    for sim in world.peers.values_mut() {
        sim.chunks = Chunks(!0b100);
    }
    let id = world.scheduler.add(read(b"b", 8 * MIB, Priority::Bulk)).unwrap();
    for _ in 0..1000 {
        world.step();
    }
    assert!(!world.scheduler.is_done(id) && world.scheduler.in_flight(id) == 0);
    world.peers.get_mut(&peer(1)).unwrap().chunks = Chunks::ALL;
    world.run(&[id]);
    world.assert_whole(id, 8 * MIB);
}

#[test]
fn failures_put_bytes_back_and_are_retried_elsewhere_then_later() {
    let start = Instant::now();
    let mut scheduler = Scheduler::default();
    let holders = |count: u8| {
        move |_: ShardId| {
            let all = (0..count).map(peer);
            all.map(|peer| Holder { peer, score: 0.5, chunks: Chunks::ALL }).collect()
        }
    };
    let id = scheduler.add(read(b"a", MIB, Priority::Token)).unwrap();
    let asks = scheduler.schedule(start, true, &holders(2));
    assert_eq!((asks.len(), asks[0].range), (1, range(0, MIB)));
    assert_eq!(scheduler.end(start, id, asks[0].request, Outcome::Failed), None);
    let again = scheduler.schedule(start, true, &holders(2));
    assert!(again.len() == 1 && again[0].peer != asks[0].peer, "at once, of the other");
    assert_eq!(scheduler.end(start, id, again[0].request, Outcome::Failed), None);
    assert_eq!(scheduler.schedule(start, true, &holders(2)), []);
    assert_eq!(scheduler.wake(start, id), Some(start + RETRY_FIRST));
    assert_eq!(scheduler.schedule(start + RETRY_FIRST, true, &holders(2)).len(), 1);
    scheduler.remove(start, id);
    assert!(scheduler.reads.is_empty() && scheduler.links.in_flight(peer(0)) == 0);
    // The answer to a request of a read that is gone means nothing.
    assert_eq!(scheduler.end(start, id, again[0].request, Outcome::Delivered(1)), None);
    for _ in 0..READS_MAX {
        scheduler.add(read(b"a", 1, Priority::Bulk)).unwrap();
    }
    assert!(scheduler.add(read(b"a", 1, Priority::Bulk)).is_err());
}

#[test]
fn ranges_put_back_join_their_neighbours() {
    let mut todo = vec![range(0, 5), range(10, 15)];
    insert(&mut todo, range(20, 25));
    insert(&mut todo, range(5, 10));
    assert_eq!(todo, [range(0, 15), range(20, 25)]);
}
