//! Nodes that look for each other in virtual time: links are cut, peers leave and come back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_ids::{Address, PeerId};

use super::*;

const LATENCY: Duration = Duration::from_millis(10);
/// How long a dial takes that nobody answers, and how long it takes to notice that a peer has gone.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(20);
const SECOND: Duration = Duration::from_secs(1);
/// What is promised.
const MET_WITHIN: Duration = Duration::from_secs(20);

struct Blind;

impl Sight for Blind {
    fn proved(&self, _: ReadId, _: RequestId) -> u64 {
        0
    }

    fn is_throttled(&self, _: Instant) -> bool {
        false
    }
}

enum Next {
    Tell(Event),
    Wake,
    Dialled(usize),
    TimedOut(usize),
    Noticed(usize),
}

struct World {
    now: Instant,
    cores: Vec<Core>,
    links: BTreeSet<(usize, usize)>,
    dialling: BTreeSet<(usize, usize)>,
    /// These nodes cannot reach any other, nor be reached.
    cut: BTreeSet<usize>,
    queue: BTreeMap<(Instant, u64), (usize, Next)>,
    sequence: u64,
    dials: usize,
}

fn id(node: usize) -> PeerId {
    PeerId::from_seed([node as u8 + 1; 32])
}

fn address(node: usize) -> Address {
    format!("/ip4/10.0.0.{}/tcp/1", node + 1).parse().unwrap()
}

impl World {
    fn new(nodes: usize) -> Self {
        let mut world = Self {
            now: Instant::now(),
            cores: Vec::new(),
            links: BTreeSet::new(),
            dialling: BTreeSet::new(),
            cut: BTreeSet::new(),
            queue: BTreeMap::new(),
            sequence: 0,
            dials: 0,
        };
        for node in 0..nodes {
            world.cores.push(world.fresh(node));
            world.tell(node, Event::Addresses(vec![address(node)]));
        }
        world
    }

    fn fresh(&self, node: usize) -> Core {
        let (timing, find_timeout) = (Timing::default(), Duration::from_secs(30));
        let (run, topic) = (self.sequence + 1, "t".to_owned());
        let config = Config { own: id(node), run, epoch: run, topic, timing, find_timeout };
        Core::new(config, self.now)
    }

    /// The node starts again and knows the peers in its file.
    fn restart(&mut self, node: usize, remembers: &[usize]) {
        self.cores[node] = self.fresh(node);
        self.tell(node, Event::Addresses(vec![address(node)]));
        for peer in remembers {
            self.knows(node, *peer, Source::Remembered);
        }
    }

    fn knows(&mut self, node: usize, peer: usize, source: Source) {
        let addresses = vec![address(peer)];
        self.tell(node, Event::Known { peer: id(peer), source, addresses });
    }

    fn at(&mut self, at: Instant, node: usize, next: Next) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), (node, next));
    }

    fn are_connected(&self, one: usize, other: usize) -> bool {
        self.links.contains(&(one, other)) && self.links.contains(&(other, one))
    }

    fn connect(&mut self, one: usize, other: usize) {
        self.links.extend([(one, other), (other, one)]);
        self.tell_contacts(one);
        self.tell_contacts(other);
    }

    fn tell_contacts(&mut self, node: usize) {
        let others: Vec<usize> =
            self.links.iter().filter(|(from, _)| *from == node).map(|link| link.1).collect();
        let contact = |peer: usize| Contact {
            is_direct: true,
            listens: true,
            reached: vec![address(peer)],
            topics: Vec::new(),
        };
        let contacts = others.into_iter().map(|peer| (id(peer), contact(peer))).collect();
        self.tell(node, Event::Contacts(contacts));
    }

    /// Nothing goes to or from a node any more, which its peers notice after a while.
    fn cut(&mut self, node: usize) {
        self.cut.insert(node);
        let links: Vec<_> = self.links.iter().copied().collect();
        for (one, other) in links.into_iter().filter(|(a, b)| *a == node || *b == node) {
            self.at(self.now + SILENCE, one, Next::Noticed(other));
        }
    }

    fn mend(&mut self, node: usize) {
        self.cut.remove(&node);
    }

    fn tell(&mut self, node: usize, event: Event) {
        let now = self.now;
        let actions = self.cores[node].on(now, event, &Blind);
        let wake = self.cores[node].next_wake();
        self.at(wake.max(now), node, Next::Wake);
        for action in actions {
            match action {
                Action::Publish(data) => self.publish(node, &data),
                Action::Dial { peer, addresses } => {
                    let peer = (0..self.cores.len()).find(|other| id(*other) == peer).unwrap();
                    assert_eq!(addresses, [address(peer)]);
                    self.dials += 1;
                    if self.dialling.insert((node, peer)) {
                        self.at(now + LATENCY, node, Next::Dialled(peer));
                    }
                }
                Action::Judge { is_sound, .. } => assert!(is_sound),
                Action::Changed | Action::ForgetStreams(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Gossip reaches every node to which a chain of connections leads.
    fn publish(&mut self, author: usize, data: &[u8]) {
        let mut reached = BTreeSet::from([author]);
        let mut open = vec![author];
        while let Some(node) = open.pop() {
            for other in 0..self.cores.len() {
                let passes = !self.cut.contains(&node) && !self.cut.contains(&other);
                if passes && self.are_connected(node, other) && reached.insert(other) {
                    open.push(other);
                }
            }
        }
        for node in reached.into_iter().filter(|node| *node != author) {
            let (topic, word) = ("t".into(), data.to_vec().into());
            let event = Event::Gossip { message: 0, topic, author: id(author), word };
            self.at(self.now + LATENCY, node, Next::Tell(event));
        }
    }

    fn step(&mut self, node: usize, next: Next) {
        match next {
            Next::Tell(event) => self.tell(node, event),
            Next::Dialled(peer) if self.cut.contains(&node) || self.cut.contains(&peer) => {
                self.at(self.now + DIAL_TIMEOUT, node, Next::TimedOut(peer));
            }
            Next::Dialled(peer) => {
                self.dialling.remove(&(node, peer));
                self.connect(node, peer);
            }
            Next::TimedOut(peer) => {
                self.dialling.remove(&(node, peer));
                let (peer, reason) = (id(peer), "timed out".to_owned());
                self.tell(node, Event::NotReached { peer, reason, is_stranger: false });
            }
            Next::Noticed(peer) => {
                if self.cut.contains(&node) || self.cut.contains(&peer) {
                    self.links.remove(&(node, peer));
                    self.tell_contacts(node);
                }
            }
            Next::Wake if self.cores[node].next_wake() <= self.now => {
                self.tell(node, Event::Time);
            }
            Next::Wake => {}
        }
    }

    fn run_until(&mut self, limit: Instant, done: impl Fn(&Self) -> bool) -> bool {
        while !done(self) {
            let ((at, sequence), (node, next)) = self.queue.pop_first().expect("somebody wakes");
            if at >= limit {
                self.queue.insert((at, sequence), (node, next));
                self.now = limit;
                return false;
            }
            self.now = self.now.max(at);
            self.step(node, next);
        }
        true
    }

    fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time, |_| false);
    }

    /// Whether a node counts another as gone: it knows nothing of it, or misses it.
    fn misses(&self, node: usize, other: usize) -> bool {
        let core = &self.cores[node];
        !core.membership.knows(id(other)) || core.is_missing(self.now, id(other))
    }

    fn assert_met(&mut self, one: usize, other: usize) {
        let from = self.now;
        let met = self.run_until(from + MET_WITHIN, |world| world.are_connected(one, other));
        assert!(met, "{one} and {other} have not met");
    }
}

/// Two nodes that met through the local network, the last run or a third node.
fn by_each_way() -> Vec<World> {
    let mut worlds = Vec::new();
    for source in [Source::Found, Source::Remembered] {
        let mut world = World::new(2);
        world.knows(0, 1, source);
        worlds.push(world);
    }
    let mut world = World::new(3);
    world.connect(0, 2);
    world.connect(1, 2);
    worlds.push(world);
    for world in &mut worlds {
        world.assert_met(0, 1);
        world.run_for(60 * SECOND);
        // The third node is gone for good.
        if world.cores.len() > 2 {
            world.cut(2);
        }
    }
    worlds
}

#[test]
fn after_a_cut_of_ninety_seconds_they_meet_again() {
    for mut world in by_each_way() {
        world.cut(0);
        world.run_for(90 * SECOND);
        assert!(!world.are_connected(0, 1));
        world.mend(0);
        world.assert_met(0, 1);
    }
}

#[test]
fn after_ten_minutes_of_absence_they_meet_again_whoever_looks() {
    for mut world in by_each_way() {
        world.cut(1);
        world.run_for(600 * SECOND);
        let told = world.cores[0].away(world.now);
        let away = told.iter().find(|away| away.peer == id(1)).unwrap();
        assert_eq!(away.failure.as_deref(), Some("timed out"));
        assert!(away.dials > 30 && away.next <= 15 * SECOND, "{away:?}");
        // It starts again and knows nobody; the other one looks for it.
        world.restart(1, &[]);
        world.mend(1);
        world.assert_met(0, 1);
        // The other way round: only the one that comes back knows whom it met.
        world.run_for(60 * SECOND);
        world.cut(1);
        world.run_for(600 * SECOND);
        world.restart(0, &[]);
        world.restart(1, &[0]);
        world.mend(1);
        world.assert_met(0, 1);
    }
}

#[test]
fn a_node_that_starts_while_its_known_peer_is_down_meets_it_later() {
    let mut world = World::new(2);
    world.cut(1);
    world.restart(0, &[1]);
    world.run_for(3600 * SECOND);
    world.mend(1);
    world.assert_met(0, 1);
}

#[test]
fn nodes_that_hold_nothing_know_each_other_when_the_one_that_they_asked_dies() {
    let mut world = World::new(6);
    for node in 1..6 {
        world.connect(0, node);
    }
    world.run_for(30 * SECOND);
    world.cut(0);
    world.run_for(600 * SECOND);
    for one in 1..6 {
        assert!((1..6).all(|other| one == other || world.are_connected(one, other)), "{one}");
    }
    // One that joins while another is away meets that one, too, once it is back.
    world.cut(5);
    world.run_for(60 * SECOND);
    world.mend(5);
    world.assert_met(1, 5);
}

#[test]
fn looking_for_the_lost_costs_little() {
    let mut world = World::new(60);
    for node in 1..60 {
        world.connect(0, node);
    }
    for node in 1..60 {
        world.cut(node);
    }
    world.run_for(600 * SECOND);
    let before = world.dials;
    world.run_for(600 * SECOND);
    // Of the peers that node 0 looks for, 32 are dialled about every 12 s, the others once.
    let alone = world.cores[0].away(world.now);
    assert_eq!(alone.len(), 59);
    let per_node = (world.dials - before) / 60;
    assert!(per_node > 32 && per_node < 32 * 60, "{per_node} dials in ten minutes");
}

/// Nodes that have met, all of them.
fn all_met(nodes: usize) -> World {
    let mut world = World::new(nodes);
    for node in 1..nodes {
        world.connect(0, node);
    }
    world.run_for(60 * SECOND);
    let pairs = (0..nodes).flat_map(|one| (0..one).map(move |other| (one, other)));
    assert!(pairs.clone().all(|(one, other)| world.are_connected(one, other)));
    assert!(pairs.into_iter().all(|(one, other)| !world.misses(one, other)));
    world
}

#[test]
fn the_dead_are_missed_within_ten_seconds_however_late_their_connections_break() {
    for nodes in [3, 10, 30] {
        let mut world = all_met(nodes);
        let dead = nodes / 3;
        for node in 0..dead {
            world.cut(node);
        }
        world.run_for(10 * SECOND);
        assert!(world.are_connected(0, nodes - 1), "nobody has noticed a broken connection");
        for node in dead..nodes {
            for other in (0..nodes).filter(|other| *other != node) {
                assert_eq!(world.misses(node, other), other < dead, "{nodes}: {node} of {other}");
            }
        }
    }
}

#[test]
fn nobody_who_lives_is_missed_in_five_minutes() {
    let mut world = all_met(12);
    for second in 0..300 {
        world.run_for(SECOND);
        for node in 0..12 {
            for other in (0..12).filter(|other| *other != node) {
                assert!(!world.misses(node, other), "{node} misses {other} after {second} s");
            }
        }
    }
}

#[test]
fn two_others_dial_a_doubted_peer_for_all() {
    let mut world = all_met(12);
    for other in (0..12).filter(|other| *other != 5) {
        world.links.remove(&(5, other));
        world.links.remove(&(other, 5));
        world.tell_contacts(other);
    }
    let doubt = |message| {
        let (topic, author) = ("t".into(), id(4));
        let data = Envelope::Doubt(id(5).to_bytes()).encode();
        Event::Gossip { message, topic, author, word: data.into() }
    };
    // It has not spoken since.
    let now = world.now + limits::DOUBT_AFTER;
    let mut dials = |message| {
        let others = world.cores.iter_mut().enumerate().filter(|(node, _)| ![4, 5].contains(node));
        let dials = others.flat_map(|(_, core)| core.on(now, doubt(message), &Blind));
        let to = |action: &Action| matches!(action, Action::Dial { peer, .. } if *peer == id(5));
        dials.filter(to).count()
    };
    assert_eq!(dials(1), limits::WITNESSES);
    assert_eq!(dials(2), 0, "once for each silence");
}

#[test]
fn a_goodbye_is_believed_at_once_and_a_later_run_after_it() {
    let mut world = all_met(5);
    world.tell(3, Event::Stop);
    world.run_for(2 * LATENCY);
    let known =
        |world: &World| (0..5).filter(|node| world.cores[*node].membership.knows(id(3))).count();
    assert_eq!(known(&world), 0);
    // It says nothing more, whatever it is told.
    world.tell(3, Event::Addresses(vec![address(3)]));
    world.run_for(60 * SECOND);
    assert_eq!(known(&world), 0);
    world.restart(3, &[]);
    world.tell_contacts(3);
    world.run_for(SECOND);
    assert_eq!(known(&world), 4);
}

#[test]
fn every_doubt_is_answered_and_one_that_its_answer_has_overtaken_counts_for_nothing() {
    let mut world = all_met(3);
    let doubt = |world: &mut World, of: usize, at: usize| {
        let (topic, author) = ("t".into(), id(2));
        let data = Envelope::Doubt(id(of).to_bytes()).encode();
        world.tell(at, Event::Gossip { message: 0, topic, author, word: data.into() });
    };
    let beats = |world: &World| world.cores[1].membership.heard(id(0));
    for pause in [0, 400, 700, 1300, 20] {
        world.run_for(Duration::from_millis(pause));
        doubt(&mut world, 0, 0);
        let (now, before) = (world.now, beats(&world));
        let limit = now + limits::REFUTE_EVERY + 2 * LATENCY;
        assert!(world.run_until(limit, |world| beats(world) > before.max(Some(now))), "{pause}");
        // The other hears the doubt after the answer.
        doubt(&mut world, 0, 1);
        for _ in 0..60 {
            world.run_for(SECOND / 10);
            assert!(!world.cores[1].is_missing(world.now, id(0)), "after {pause} ms");
        }
    }
}
