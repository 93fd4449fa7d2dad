//! The scheduler under a simulated clock and simulated peers: each has a rate and may fall silent,
//! break off or lie. No sockets, no sleeping; the same seed gives the same run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// A request at its peer.
struct Sending {
    ask: Ask,
    /// Bytes left.
    left: f64,
    proved: Arc<AtomicU64>,
}

impl Sending {
    fn prove(&self) {
        let (start, end) = (self.ask.range.start(), self.ask.range.end());
        let came = (self.ask.range.len() as f64 - self.left) as u64;
        let proved = if self.left <= 0.0 { end } else { start + came / GROUP_BYTES * GROUP_BYTES };
        self.proved.store(if proved > start { proved } else { 0 }, Ordering::Relaxed);
    }
}

/// A peer that answers one request after another.
struct Sim {
    rate: f64,
    chunks: Chunks,
    /// Sends nothing from here on.
    silent_from: f64,
    queue: Vec<Sending>,
    /// Bytes of it that were taken.
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
    /// Shards that only some peers hold. All peers hold the others.
    only: BTreeMap<ShardId, Vec<PeerId>>,
    /// Requests in the order in which they were made.
    asked: Vec<Ask>,
    delivered: BTreeMap<ReadId, Vec<ByteRange>>,
    beaten: Vec<Beaten>,
    /// The progress of requests.
    proved: BTreeMap<RequestId, Arc<AtomicU64>>,
    reads: ReadId,
}

const TICK: f64 = 0.005;

fn seen(proved: &BTreeMap<RequestId, Arc<AtomicU64>>, request: RequestId) -> u64 {
    proved.get(&request).map_or(0, |proved| proved.load(Ordering::Relaxed))
}

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
            proved: BTreeMap::new(),
            reads: 0,
        }
    }

    fn at(&self) -> Instant {
        self.start + Duration::from_secs_f64(self.now)
    }

    fn add(&mut self, request: ReadRequest) -> ReadId {
        self.reads += 1;
        self.scheduler.add(self.reads, request).unwrap();
        self.reads
    }

    fn assign(&mut self) {
        let now = self.at();
        let Self { scheduler, peers, only, proved, .. } = self;
        let seen = |_: ReadId, request: RequestId| seen(proved, request);
        let asks = scheduler.schedule(
            now,
            true,
            &|shard| {
                let holds = |peer: &PeerId| only.get(&shard).is_none_or(|all| all.contains(peer));
                let all = peers.iter().filter(|(peer, _)| holds(peer));
                all.map(|(peer, sim)| Holder { peer: *peer, score: 0.5, chunks: sim.chunks })
                    .collect()
            },
            &seen,
        );
        for ask in asks {
            assert!(ask.range.len() <= SERVE_BYTES_MAX);
            assert_eq!(ask.range.start() % GROUP_BYTES, 0);
            let here = self.delivered.get(&ask.read).into_iter().flatten();
            assert!(here.into_iter().all(|part| !part.overlaps(&ask.range)), "it is here");
            let sending = self.peers.values().flat_map(|sim| &sim.queue);
            for other in sending.filter(|other| other.ask.read == ask.read) {
                let proved = other.proved.load(Ordering::Relaxed);
                let proved = ByteRange::new(other.ask.range.start(), proved);
                assert!(proved.is_none_or(|part| !part.overlaps(&ask.range)), "it is proved");
            }
            let sim = self.peers.get_mut(&ask.peer).unwrap();
            assert!(sim.chunks.cover(ask.range), "it does not hold that");
            let proved = Arc::default();
            self.proved.insert(ask.request, Arc::clone(&proved));
            sim.queue.push(Sending { ask, left: ask.range.len() as f64, proved });
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
            while let Some(sending) = self.peers.get_mut(&id).unwrap().queue.first_mut() {
                self.scheduler.links.heard(now, id);
                let sent = may_send.min(sending.left);
                sending.left -= sent;
                sending.prove();
                if sending.left > 0.0 {
                    break;
                }
                may_send -= sent;
                let done = self.peers.get_mut(&id).unwrap().queue.remove(0);
                self.ended(&done, Outcome::Delivered);
            }
        }
    }

    /// Handles the end of a request: delivers what it and the request that it beat had proved.
    fn ended(&mut self, done: &Sending, outcome: Outcome) {
        let (now, ask) = (self.at(), done.ask);
        let proved = done.proved.load(Ordering::Relaxed);
        let Self { scheduler, proved: all, .. } = self;
        let seen = |request| seen(all, request);
        let ended = scheduler.end(now, ask.read, ask.request, outcome, proved, &seen);
        let Some(Ended { keep, beaten }) = ended else { return };
        if let Some(keep) = keep {
            self.peers.get_mut(&ask.peer).unwrap().sent += keep.len();
            self.delivered.entry(ask.read).or_default().push(keep);
        }
        let Some(beaten) = beaten else { return };
        self.beaten.push(beaten);
        // Its stream is reset.
        let queue = &mut self.peers.get_mut(&beaten.peer).unwrap().queue;
        let at = queue.iter().position(|sending| sending.ask.request == beaten.request);
        let stopped = queue.remove(at.expect("it is under way"));
        if beaten.is_wanted {
            self.ended(&stopped, Outcome::Stopped);
        }
    }

    /// Runs until these are done. Returns the seconds it took.
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

    /// Asserts that what came for a read is exactly its range, each byte once.
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
    let id = world.add(read(b"a", bytes, Priority::Bulk));
    let seconds = world.run(&[id]);
    world.assert_whole(id, bytes);
    assert!(bytes as f64 / seconds > 50e6, "{:.1} MB/s", bytes as f64 / 1e6 / seconds);

    let mut world = World::new(&[40e6, 10e6]);
    let ids = [b"a", b"b", b"c"].map(|shard| world.add(read(shard, 64 * MIB, Priority::Bulk)));
    let seconds = world.run(&ids);
    let rate = 3.0 * 64.0 * MIB as f64 / seconds;
    assert!(rate > 45e6, "{:.1} of 50 MB/s", rate / 1e6);
    let [fast, slow] = [0, 1].map(|index| world.peers[&peer(index)].sent as f64);
    assert!(fast / slow > 3.0 && fast / slow < 6.0, "{:.1} instead of 4", fast / slow);
    // The slow peer was asked for less at a time.
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
    let id = world.add(read(b"a", bytes, Priority::Token));
    let seconds = world.run(&[id]);
    world.assert_whole(id, bytes);
    let alone = bytes as f64 / 50e6;
    assert!(seconds < alone + 0.8, "{seconds:.2} s, one peer alone takes {alone:.2}");
    assert!(world.beaten.iter().all(|beaten| beaten.peer == peer(0)));
    assert!(world.beaten.iter().any(|beaten| beaten.is_silent), "it is told who was silent");
    // Soon after it fell silent, it was asked for nothing more.
    let after = world.asked.len();
    let id = world.add(read(b"b", 4 * MIB, Priority::Token));
    world.run(&[id]);
    let asked = world.asked[after..].iter().filter(|ask| ask.peer == peer(0)).count();
    assert!(asked <= 1, "{asked}");
}

#[test]
fn a_second_peer_is_asked_only_for_what_is_missing() {
    // The first peer is fast and falls silent in the middle of a request. The second comes later.
    let mut world = World::new(&[40e6]);
    world.peers.get_mut(&peer(0)).unwrap().silent_from = 0.37;
    let bytes = 24 * MIB - 7;
    let id = world.add(read(b"a", bytes, Priority::Token));
    while world.now < 1.0 {
        world.step();
    }
    let here: u64 = world.delivered[&id].iter().map(ByteRange::len).sum();
    let head = &world.peers[&peer(0)].queue[0];
    let proved = head.proved.load(Ordering::Relaxed) - head.ask.range.start();
    assert!(proved > 0 && head.left > 0.0, "it is in the middle of one");
    world.peers.insert(peer(1), Sim::new(40e6));
    let asked_before = world.asked.len();
    world.run(&[id]);
    world.assert_whole(id, bytes);
    let again: u64 = world.asked[asked_before..].iter().map(|ask| ask.range.len()).sum();
    assert_eq!(again, bytes - here - proved, "each byte that was not here, and no other");
    assert_eq!(world.peers[&peer(0)].sent, here + proved);
    assert!(world.beaten.iter().any(|beaten| beaten.is_wanted && beaten.is_silent));
    assert_eq!(world.scheduler.links.in_flight(peer(0)), 0);
}

#[test]
fn what_was_proved_before_a_break_is_not_asked_for_again() {
    let mut world = World::new(&[40e6]);
    let id = world.add(read(b"a", 16 * MIB, Priority::Bulk));
    for _ in 0..10 {
        world.step();
    }
    let broken = world.peers.get_mut(&peer(0)).unwrap().queue.remove(0);
    let proved = broken.proved.load(Ordering::Relaxed) - broken.ask.range.start();
    assert!(proved > 0 && broken.left > 0.0);
    world.ended(&broken, Outcome::Failed);
    world.run(&[id]);
    world.assert_whole(id, 16 * MIB);
    let asked: u64 = world.asked.iter().map(|ask| ask.range.len()).sum();
    assert_eq!(asked, 16 * MIB + broken.ask.range.len() - proved);
}

#[test]
fn whatever_the_interleaving_every_byte_comes_once() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let (mut stopped, mut broken) = (0, 0);
    for round in 0..60 {
        let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(round));
        let rates: Vec<f64> = (0..4).map(|_| rng.random_range(2e6..60e6)).collect();
        let mut world = World::new(&rates);
        let mut reads = BTreeMap::new();
        for index in 0..rng.random_range(1..5u8) {
            let priority = if rng.random() { Priority::Token } else { Priority::Bulk };
            let bytes = rng.random_range(1..24 * MIB);
            reads.insert(world.add(read(&[index], bytes, priority)), bytes);
        }
        while reads.keys().any(|id| !world.scheduler.is_done(*id)) {
            assert!(world.now < 600.0, "not done within ten minutes");
            world.step();
            let id = peer(rng.random_range(0..4));
            let now = world.now;
            let sim = world.peers.get_mut(&id).unwrap();
            match rng.random_range(0..100) {
                // Silent for a while, or back again; slow, or fast.
                0..=2 => sim.silent_from = now,
                3..=5 => sim.silent_from = f64::MAX,
                6 => sim.rate = rng.random_range(0.2e6..60e6),
                // One of its requests breaks, or everything that came of it is worthless.
                7..=9 if !sim.queue.is_empty() => {
                    let end = sim.queue.remove(rng.random_range(0..sim.queue.len()));
                    if rng.random_range(0..3) == 0 {
                        end.proved.store(0, Ordering::Relaxed);
                    }
                    world.ended(&end, Outcome::Failed);
                    broken += 1;
                }
                _ => {}
            }
        }
        for (id, bytes) in &reads {
            world.scheduler.remove(world.at(), *id);
            world.assert_whole(*id, *bytes);
        }
        stopped += world.beaten.iter().filter(|beaten| beaten.is_wanted).count();
        assert_eq!(world.scheduler.twins, 0);
        for id in world.peers.keys() {
            assert_eq!(world.scheduler.links.in_flight(*id), 0);
        }
    }
    println!("{stopped} stopped with something, {broken} broken");
    assert!(stopped > 0 && broken > 0);
}

#[test]
fn a_peer_that_slows_down_is_hedged_and_repeats_are_bounded() {
    let mut world = World::new(&[40e6, 40e6]);
    let warm = world.add(read(b"warm", 64 * MIB, Priority::Bulk));
    world.run(&[warm]);
    world.peers.get_mut(&peer(0)).unwrap().rate = 0.4e6;
    let started = world.asked.len();
    let token = world.add(read(b"t", 4 * MIB, Priority::Token));
    let seconds = world.run(&[token]);
    world.assert_whole(token, 4 * MIB);
    assert!(seconds < 1.0, "{seconds:.2} s; at the slow peer's pace it takes 5");
    assert!(world.asked.len() > started);

    // However often peers are late, repeated bytes stay a fraction of those delivered.
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for index in 0..60u32 {
        for sim in world.peers.values_mut() {
            sim.rate = rng.random_range(0.5e6..60e6);
        }
        let priority = if rng.random() { Priority::Token } else { Priority::Bulk };
        let read = read(&index.to_le_bytes(), rng.random_range(1..16 * MIB), priority);
        let id = world.add(read);
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
        world.add(read)
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
    // A second peer, which sends nothing, holds all except the rare one.
    world.peers.insert(peer(9), Sim { silent_from: 0.0, ..Sim::new(1.0) });
    let rare_shard = ShardId::of(b"rare");
    world.only.insert(rare_shard, vec![peer(0)]);
    // It counts only for rarity, because it has failed all of them.
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
    let id = world.add(read(b"a", 64 * MIB, Priority::Bulk));
    let seconds = world.run(&[id]);
    world.assert_whole(id, 64 * MIB);
    assert!(seconds < 1.5, "{seconds:.2} s: both at once take 1.1");
    // The next one has a gap that no peer can fill: it waits, and continues once one can.
    for sim in world.peers.values_mut() {
        sim.chunks = Chunks(!0b100);
    }
    let id = world.add(read(b"b", 8 * MIB, Priority::Bulk));
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
    let id = 1;
    scheduler.add(id, read(b"a", MIB, Priority::Token)).unwrap();
    let (none, nothing_seen) = (|_: RequestId| 0, |_: ReadId, _: RequestId| 0);
    let asks = scheduler.schedule(start, true, &holders(2), &nothing_seen);
    assert_eq!((asks.len(), asks[0].range), (1, range(0, MIB)));
    let nothing = Some(Ended { keep: None, beaten: None });
    assert_eq!(scheduler.end(start, id, asks[0].request, Outcome::Failed, 0, &none), nothing);
    let again = scheduler.schedule(start, true, &holders(2), &nothing_seen);
    assert!(again.len() == 1 && again[0].peer != asks[0].peer, "at once, of the other peer");
    assert_eq!(scheduler.end(start, id, again[0].request, Outcome::Failed, 0, &none), nothing);
    assert_eq!(scheduler.schedule(start, true, &holders(2), &nothing_seen), []);
    assert_eq!(scheduler.wake(start, id), Some(start + RETRY_FIRST));
    assert_eq!(scheduler.schedule(start + RETRY_FIRST, true, &holders(2), &nothing_seen).len(), 1);
    scheduler.remove(start, id);
    assert!(scheduler.reads.is_empty() && scheduler.links.in_flight(peer(0)) == 0);
    // An answer to a request of a read that is gone is ignored.
    assert_eq!(scheduler.end(start, id, again[0].request, Outcome::Delivered, MIB, &none), None);
    for id in 0..READS_MAX as ReadId {
        scheduler.add(id, read(b"a", 1, Priority::Bulk)).unwrap();
    }
    assert!(scheduler.add(ReadId::MAX, read(b"a", 1, Priority::Bulk)).is_err());
}

#[test]
fn ranges_put_back_join_their_neighbours() {
    let mut todo = vec![range(0, 5), range(10, 15)];
    insert(&mut todo, range(20, 25));
    insert(&mut todo, range(5, 10));
    assert_eq!(todo, [range(0, 15), range(20, 25)]);
}
