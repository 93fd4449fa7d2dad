//! How far the model of gossip (`gossip`) is from the real thing: the same nodes, links, delays and
//! messages, once in virtual time and once as real swarms.
//!
//! What is compared can be counted on encrypted lines, too: when each node first has each message, and
//! bytes. Two batches of messages differ in size alone, so the difference of their bytes, divided by
//! that of their sizes, is the number of copies.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppler_swarm::{Options, SwarmEvents, SwarmHandle};
use tokio::time::{interval, sleep_until};

use super::network::{Lines, Network, address_of};
use crate::gossip::{Gossip, is_large};
use crate::net::latency;
use crate::options::{MS, SECOND};
use crate::rng::Rng;

/// Until meshes are what they will be: gossipsub's first heartbeat comes after 5 s.
const WARM_UP: Duration = Duration::from_secs(9);
/// Lines are slower than elsewhere, so that what threads add to a delay hardly counts.
const STRETCH: u64 = 8;
/// Links are dialled one after the other: who is met first is in the mesh, and that must not depend on how
/// busy the machine is. After the last of them, nodes have so long to meet.
const DIALS: Duration = Duration::from_millis(25);
const MEET: Duration = Duration::from_secs(3);
/// Trips from a dial until both ends know the other's topics: sockets, encryption, multiplexer, and the
/// stream for gossip.
const HANDSHAKE: u64 = 8;
/// What nodes say.
const PROTOCOL: &str = "/simnet/1";

/// What is run twice.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    /// Who dials whom.
    pub links: Vec<(usize, usize)>,
    /// Messages of a batch, and the time between two of them.
    pub messages: usize,
    pub every: Duration,
    /// Bytes of data of the messages of each batch.
    pub sizes: [usize; 2],
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Relaying {
    /// Milliseconds until half of the nodes, and 99 of 100, have a message.
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Copies of each message that a node receives.
    pub copies: f64,
    /// Bytes that a node sends for each message of the first batch.
    pub bytes: f64,
}

impl Plan {
    /// Each node has at least `degree` links: to the next one and to others drawn from the seed.
    pub fn new(seed: u64, nodes: usize, degree: usize) -> Self {
        let mut rng = Rng::fork(seed, "links", 0);
        let mut links = BTreeSet::new();
        let has = |links: &BTreeSet<(usize, usize)>, one: usize, other: usize| {
            links.contains(&(one, other)) || links.contains(&(other, one))
        };
        for one in 0..nodes {
            let next = (one + 1) % nodes;
            if next != one && !has(&links, one, next) {
                links.insert((one, next));
            }
        }
        for one in 0..nodes {
            let count = |links: &BTreeSet<(usize, usize)>| {
                links.iter().filter(|(from, to)| *from == one || *to == one).count()
            };
            while count(&links) < degree.min(nodes - 1) {
                let other = rng.below(nodes as u64) as usize;
                if other != one && !has(&links, one, other) {
                    links.insert((one, other));
                }
            }
        }
        // Dialled in no particular order.
        let mut left: Vec<(usize, usize)> = links.into_iter().collect();
        let mut links = Vec::new();
        while !left.is_empty() {
            links.push(left.swap_remove(rng.below(left.len() as u64) as usize));
        }
        let every = Duration::from_millis(60);
        Self { seed, nodes, links, messages: 60, every, sizes: [100, 700] }
    }

    /// Nanoseconds that a packet takes at least.
    const fn trip(&self, one: usize, other: usize) -> u64 {
        STRETCH * latency(self.seed, self.nodes, one, other)
    }

    fn warm_ups(&self) -> usize {
        (WARM_UP.as_nanos() / self.every.as_nanos()) as usize
    }

    /// All messages, those sent before anything is counted included.
    fn total(&self) -> usize {
        self.warm_ups() + 2 * self.messages
    }

    fn size(&self, message: usize) -> usize {
        self.sizes[usize::from(message >= self.warm_ups() + self.messages)]
    }

    fn author(&self, message: usize) -> usize {
        message % self.nodes
    }

    /// From the delays of the counted messages in nanoseconds, and from all bytes sent before, between
    /// and after the two batches.
    fn sum_up(&self, mut delays: Vec<u64>, bytes: [u64; 3]) -> Relaying {
        delays.sort_unstable();
        let at = |percent: usize| {
            let index = (delays.len() * percent / 100).min(delays.len().saturating_sub(1));
            delays.get(index).copied().unwrap_or(0) as f64 / MS as f64
        };
        let each = (self.messages * self.nodes) as f64;
        let [before, between, after] = bytes.map(|bytes| bytes as f64);
        let more = (self.sizes[1] - self.sizes[0]) as f64;
        Relaying {
            p50_ms: at(50),
            p99_ms: at(99),
            copies: ((after - between) - (between - before)) / more / each,
            bytes: (between - before) / each,
        }
    }
}

/// What is to happen in virtual time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Connect(usize, usize),
    Publish(usize),
    Arrive { to: usize, from: usize, message: usize },
}

/// The model's answer.
pub fn modelled(plan: &Plan) -> Relaying {
    let mut gossip = Gossip::new(plan.seed, plan.nodes);
    let mut rng = Rng::fork(plan.seed, "modelled", 0);
    let every = plan.every.as_nanos() as u64;
    let mut queue = BinaryHeap::new();
    for node in 0..plan.nodes {
        // Nodes do not start in step.
        gossip.begin(rng.below(SECOND), node);
    }
    for (at, (one, other)) in plan.links.iter().enumerate() {
        let at = at as u64 * DIALS.as_nanos() as u64 + HANDSHAKE * plan.trip(*one, *other);
        queue.push(Reverse((at, Next::Connect(*one, *other))));
    }
    let start = (DIALS * plan.links.len() as u32 + MEET).as_nanos() as u64;
    let said = |message: usize| start + message as u64 * every;
    for message in 0..plan.total() {
        queue.push(Reverse((said(message), Next::Publish(message))));
    }
    let mut heard = vec![vec![None; plan.nodes]; plan.total()];
    let (mut delays, mut bytes) = (Vec::new(), [0; 3]);
    let sent = |gossip: &Gossip| (0..plan.nodes).map(|node| gossip.sent(node).bytes).sum();
    while let Some(Reverse((now, next))) = queue.pop() {
        let (node, message, recipients) = match next {
            Next::Connect(one, other) => {
                gossip.connect(now, one, other);
                continue;
            }
            Next::Publish(message) => {
                match message.checked_sub(plan.warm_ups()) {
                    Some(0) => bytes[0] = sent(&gossip),
                    Some(at) if at == plan.messages => bytes[1] = sent(&gossip),
                    _ => {}
                }
                let author = plan.author(message);
                heard[message][author] = Some(now);
                (author, message, gossip.publish(now, author, plan.size(message)))
            }
            Next::Arrive { to, message, .. } if heard[message][to].is_some() => continue,
            Next::Arrive { to, from, message } => {
                heard[message][to] = Some(now);
                if message >= plan.warm_ups() {
                    delays.push(now - said(message));
                }
                let has = |other: usize| {
                    let at = heard[message][other];
                    at.is_some_and(|at: u64| at + plan.trip(other, to) <= now)
                };
                let way = (from, Some(plan.author(message)));
                (to, message, gossip.forward(now, to, way, plan.size(message), has))
            }
        };
        for to in recipients {
            let base = plan.trip(node, to);
            let at = now + base + rng.below(base / 8 + 1);
            queue.push(Reverse((at, Next::Arrive { to, from: node, message })));
        }
    }
    bytes[2] = sent(&gossip);
    plan.sum_up(delays, bytes)
}

/// A message that a node has first received.
struct Receipt {
    message: usize,
    at: Instant,
}

/// The answer of real swarms on lines of the same delays.
///
/// # Errors
/// If they cannot be started.
pub async fn measured(plan: &Plan) -> io::Result<Relaying> {
    let network = Network::new(plan.nodes, Lines { stretch: STRETCH, ..Lines::new(plan.seed) });
    let topic = doppler_mesh::topic("simnet").map_err(io::Error::other)?;
    let receipts = Arc::new(Mutex::new(Vec::new()));
    let mut swarms = Vec::new();
    let mut waits = Vec::new();
    for node in 0..plan.nodes {
        let (swarm, events) = start(&network, node, &topic, plan.seed).await?;
        let SwarmEvents { mut messages, peers, listening, .. } = events;
        let (judge, receipts) = (swarm.clone(), receipts.clone());
        let _receiving = tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                let at = Instant::now();
                let _ = judge.judge(&message, true);
                let (number, _) = message.data.as_chunks::<8>();
                let number = number.first().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                let receipt = Receipt { message: number as usize, at };
                receipts.lock().unwrap_or_else(PoisonError::into_inner).push(receipt);
            }
        });
        waits.push((peers, listening));
        swarms.push(swarm);
    }
    let mut pace = interval(DIALS);
    for (one, other) in &plan.links {
        pace.tick().await;
        let dialled = swarms[*one].dial(swarms[*other].peer(), vec![address_of(*other)]);
        dialled.map_err(io::Error::other)?;
    }
    for (node, (mut peers, _)) in waits.into_iter().enumerate() {
        let degree = plan.links.iter().filter(|(one, other)| *one == node || *other == node);
        let degree = degree.count();
        let met = peers.wait_for(|peers| {
            peers.len() == degree && peers.values().all(|peer| peer.topics.contains(&topic))
        });
        met.await.map_err(io::Error::other)?;
    }
    let (published, bytes) = say_all(plan, &network, &swarms, &topic).await?;
    for swarm in &swarms {
        swarm.shutdown().await;
    }
    let receipts = receipts.lock().unwrap_or_else(PoisonError::into_inner);
    let counted = receipts.iter().filter(|receipt| receipt.message >= plan.warm_ups());
    let delay = |receipt: &Receipt| {
        let since = receipt.at.saturating_duration_since(published[receipt.message]);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    Ok(plan.sum_up(counted.map(delay).collect(), bytes))
}

async fn start(
    network: &Arc<Network>,
    node: usize,
    topic: &str,
    seed: u64,
) -> io::Result<(SwarmHandle, SwarmEvents)> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&(node as u64 + 1).to_le_bytes());
    key[8..16].copy_from_slice(&seed.to_le_bytes());
    let options = Options {
        listen: vec![address_of(node).with_port(0)],
        protocol_version: PROTOCOL.to_owned(),
        topics: vec![topic.to_owned()],
        carrier: Some(network.carrier(node)),
        ..Options::new(key)
    };
    SwarmHandle::spawn(options).await.map_err(io::Error::other)
}

/// Publishes every message at its time. Returns when each was, and all bytes sent before, between and
/// after the batches. The last batch has as long to be passed on as the first.
async fn say_all(
    plan: &Plan,
    network: &Network,
    swarms: &[SwarmHandle],
    topic: &str,
) -> io::Result<(Vec<Instant>, [u64; 3])> {
    let sent = || (0..plan.nodes).map(|node| network.bytes(node).sent).sum();
    let mut published = Vec::new();
    let mut bytes = [0; 3];
    let mut pace = interval(plan.every);
    for message in 0..plan.total() {
        pace.tick().await;
        match message.checked_sub(plan.warm_ups()) {
            Some(0) => bytes[0] = sent(),
            Some(at) if at == plan.messages => bytes[1] = sent(),
            _ => {}
        }
        let mut data = vec![0; plan.size(message)];
        data[..8].copy_from_slice(&(message as u64).to_le_bytes());
        published.push(Instant::now());
        swarms[plan.author(message)].publish(topic, data).map_err(io::Error::other)?;
    }
    pace.tick().await;
    bytes[2] = sent();
    // What is still on its way arrives.
    sleep_until((Instant::now() + Duration::from_secs(1)).into()).await;
    Ok((published, bytes))
}

/// Whether both batches are passed on alike: copies cannot be counted otherwise.
pub const fn is_countable(plan: &Plan) -> bool {
    is_large(plan.sizes[0]) == is_large(plan.sizes[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At most a fifth more or less than what is measured.
    fn is_near(what: &str, model: f64, real: f64) -> bool {
        let is_near = (model - real).abs() <= 0.2 * real;
        let mark = if is_near { "" } else { " (!)" };
        println!("  {what}: {model:.2} modelled, {real:.2} measured{mark}");
        is_near
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "a minute of real time; delays are measured, so the machine should not be busy"]
    async fn the_model_of_gossip_is_within_a_fifth_of_real_swarms() {
        let large = Plan { sizes: [2_000, 8_000], ..Plan::new(3, 10, 9) };
        let mut far = 0;
        for plan in [Plan::new(1, 10, 9), Plan::new(2, 40, 12), large] {
            assert!(is_countable(&plan));
            let (model, real) = (modelled(&plan), measured(&plan).await.unwrap());
            println!("{} nodes, {} links, {:?} bytes", plan.nodes, plan.links.len(), plan.sizes);
            let checks = [
                is_near("half have it, ms", model.p50_ms, real.p50_ms),
                is_near("99 of 100 have it, ms", model.p99_ms, real.p99_ms),
                is_near("copies", model.copies, real.copies),
                is_near("bytes", model.bytes, real.bytes),
            ];
            far += checks.iter().filter(|is_near| !**is_near).count();
        }
        assert_eq!(far, 0, "marked with (!) above");
    }

    #[test]
    fn a_plan_connects_everybody_as_often_as_it_says() {
        let plan = Plan::new(1, 40, 12);
        for node in 0..40 {
            let links = plan.links.iter().filter(|(one, other)| *one == node || *other == node);
            assert!(links.count() >= 12);
        }
        assert_eq!(Plan::new(1, 10, 9).links.len(), 45);
        let model = modelled(&plan);
        assert!(
            model.copies > 4.0 && model.copies < 12.0 && model.p50_ms < model.p99_ms,
            "{model:?}"
        );
        assert_eq!(model, modelled(&plan), "it repeats");
    }
}
