//! The fake network: who is connected to whom, how long a packet takes, what is cut, and what
//! becomes of gossip on its way.
//!
//! To whom gossip is passed on is decided in `gossip`. Nobody takes a message twice. What is sent
//! while a link is cut is lost; anti-entropy has to make up for it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use doppler_mesh::Address;
use doppler_mesh::core::{Contact, Event, FailureKind};

use crate::crew::Passed;
use crate::faults::{KEEPERS, Kind};
use crate::options::{MS, SECOND};
use crate::queue::{Message, Next};
use crate::rng::{Rng, mix};
use crate::topics::Topic;
use crate::work::FEW as FEW_MEMBERS;
use crate::world::World;

/// A connection.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub id: u64,
    /// The relay that carries it.
    pub relay: Option<usize>,
}

/// A dead connection is noticed by its pings: every 10 s, each of which may take 10 s.
const PING: u64 = 10 * SECOND;
/// Waits between dials of a node that one was given.
const REDIAL_FIRST: u64 = 250 * MS;
const REDIAL_MAX: u64 = 15 * SECOND;
/// How often a connected one is looked at, and in a large swarm.
const REDIAL_LOOK: u64 = 2 * SECOND;
const REDIAL_LOOK_LARGE: u64 = 30 * SECOND;
/// When a relayed connection to a node that is not behind a NAT has become a direct one.
const UPGRADE: u64 = 2 * SECOND;
/// The topic of the simulated swarm.
pub const TOPIC: &str = "simnet";

/// No packet takes less than this, and in a large swarm, which is spread over the world, than that.
const LATENCY_MIN: u64 = MS / 5;
const LATENCY_MIN_LARGE: u64 = MS;

/// No packet of a swarm of so many nodes takes less than this.
pub const fn latency_min(nodes: usize) -> u64 {
    if nodes > FEW_MEMBERS { LATENCY_MIN_LARGE } else { LATENCY_MIN }
}

const fn pair(one: usize, other: usize) -> (usize, usize) {
    if one < other { (one, other) } else { (other, one) }
}

/// How long a packet takes at least between two nodes: up to 30 ms more than the least.
pub const fn latency(seed: u64, nodes: usize, one: usize, other: usize) -> u64 {
    let (low, high) = pair(one, other);
    let place = (low * nodes + high) as u64;
    latency_min(nodes) + mix(seed ^ mix(place)) % (30 * MS)
}

/// How much longer one packet takes than another on the same way.
pub fn jitter(base: u64, rng: &mut Rng) -> u64 {
    rng.below(base / 8 + 1)
}

/// Up to so many nodes, all are given the same ones to begin with.
const FEW: usize = 100;
/// Connections that a node accepts: `CONNECTIONS` of the real one.
const CONNECTIONS_MAX: usize = 256;

/// Where a node listens.
pub fn address_of(node: usize) -> Vec<Address> {
    let address = format!("/ip4/10.{}.{}.1/tcp/4001", node / 200 + 1, node % 200 + 1);
    address.parse().into_iter().collect()
}

impl World {
    pub(crate) fn link(&self, one: usize, other: usize) -> Option<Link> {
        self.links.get(&pair(one, other)).copied()
    }

    pub(crate) fn is_blocked(&self, from: usize, to: usize) -> bool {
        self.active.values().any(|fault| fault.blocks(from, to))
    }

    fn in_burst(&self, node: usize) -> bool {
        self.active
            .values()
            .any(|fault| matches!(fault.kind, Kind::Burst { node: slow } if slow == node))
    }

    /// How long a packet takes from one node to another; `None` if it does not come through.
    pub(crate) fn delay(&mut self, from: usize, to: usize) -> Option<u64> {
        if self.is_blocked(from, to) {
            return None;
        }
        let base = latency(self.options.seed, self.nodes.len(), from, to);
        let burst = self.in_burst(from) || self.in_burst(to);
        let rng = &mut self.nodes[from].rng;
        let jitter = jitter(base, rng);
        // A lost packet is sent again after a while, often several times.
        let again = if burst && rng.percent(40) { rng.between(100 * MS, 900 * MS) } else { 0 };
        Some(base + jitter + again)
    }

    /// How long so many bytes take at a rate, through the bursts of a node.
    pub(crate) fn transit(&self, node: usize, bytes: u64, rate: u64) -> u64 {
        let slow = if self.in_burst(node) { 8 } else { 1 };
        let nanos = u128::from(bytes) * u128::from(SECOND) * slow / u128::from(rate.max(1));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// A node that is not behind a NAT, is up, and reaches both.
    fn relay_for(&self, one: usize, other: usize) -> Option<usize> {
        (0..self.nodes.len()).find(|relay| {
            let node = &self.nodes[*relay];
            let open = node.is_up() && !node.is_nat && *relay != one && *relay != other;
            open && [one, other]
                .iter()
                .all(|end| self.link(*relay, *end).is_some_and(|link| link.relay.is_none()))
        })
    }

    pub(crate) fn dial(&mut self, node: usize, to: usize) {
        let (boot, latency) = (self.nodes[node].boot, self.delay(node, to));
        // A dial into nothing needs no answer: the core tries again.
        if let Some(latency) = latency {
            self.queue.push(self.now + 3 * latency, Next::Dialled { node, boot, to });
        }
    }

    pub(crate) fn on_dialled(&mut self, node: usize, to: usize) {
        let blocked = self.is_blocked(node, to) || self.is_blocked(to, node);
        if blocked || !self.nodes[to].is_up() || self.link(node, to).is_some() {
            return;
        }
        if [node, to].iter().any(|end| self.nodes[*end].contacts.len() >= CONNECTIONS_MAX) {
            return;
        }
        let now = self.now;
        let refuses =
            |one: &crate::node::Node, whom: usize| one.refused.get(&whom).is_some_and(|t| *t > now);
        if refuses(&self.nodes[to], node) || refuses(&self.nodes[node], to) {
            return;
        }
        // Nobody gets through to a node behind a NAT, except by a relay.
        let relay = if self.nodes[to].is_nat {
            let Some(relay) = self.relay_for(node, to) else { return };
            Some(relay)
        } else {
            None
        };
        self.numbers += 1;
        self.links.insert(pair(node, to), Link { id: self.numbers, relay });
        self.gossip.connect(now, node, to);
        if relay.is_some() && !self.nodes[node].is_nat {
            let upgrade = Next::Upgrade { one: node, other: to, link: self.numbers };
            self.queue.push(self.now + UPGRADE, upgrade);
        }
        for (one, other) in [(node, to), (to, node)] {
            self.nodes[one].contacts.insert(other);
            self.tell_contacts(one);
        }
    }

    /// The one behind the NAT has dialled back.
    pub(crate) fn on_upgrade(&mut self, one: usize, other: usize, id: u64) {
        let cut = self.is_blocked(one, other) || self.is_blocked(other, one);
        let Some(link) = self.links.get_mut(&pair(one, other)).filter(|link| link.id == id) else {
            return;
        };
        if !cut {
            link.relay = None;
            self.tell_contacts(one);
            self.tell_contacts(other);
        }
    }

    /// A node joins or leaves a model's topic, and its peers hear of it.
    pub(crate) fn on_topic(&mut self, node: usize, model: usize, joins: bool) {
        let peers = self.nodes[node].contacts.clone();
        if joins {
            self.gossip.join(self.now, node, model, &peers);
        } else {
            self.gossip.leave(node, model);
        }
        for peer in peers {
            self.tell_contacts(peer);
        }
    }

    fn tell_contacts(&mut self, node: usize) {
        let contact = |other: &usize| {
            let relay = self.link(node, *other).and_then(|link| link.relay);
            let there = &self.nodes[*other];
            let reached = if relay.is_none() { there.address.clone() } else { Vec::new() };
            let topics = self.gossip.joined(*other).iter();
            let topics = topics.map(|model| Arc::clone(&self.topic_names[*model])).collect();
            let contact = Contact { is_direct: relay.is_none(), listens: true, reached, topics };
            (there.id, contact)
        };
        let contacts: BTreeMap<_, _> = self.nodes[node].contacts.iter().map(contact).collect();
        self.tell(node, Event::Contacts(contacts));
    }

    pub(crate) fn disconnect(&mut self, one: usize, other: usize) {
        if self.links.remove(&pair(one, other)).is_none() {
            return;
        }
        self.gossip.disconnect(one, other);
        for (node, gone) in [(one, other), (other, one)] {
            self.nodes[node].contacts.remove(&gone);
            if !self.nodes[node].is_up() {
                continue;
            }
            let lost = self.nodes[node].replies.0.iter();
            let lost: Vec<_> =
                lost.filter(|(_, reply)| reply.from == gone).map(|(key, _)| *key).collect();
            let boot = self.nodes[node].boot;
            for key in lost {
                let kind = Some(FailureKind::Lost);
                self.queue.push(self.now, Next::Answer { node, boot, key, kind });
            }
            self.tell_contacts(node);
        }
    }

    /// Peers find out that a node is gone, or a link cut: at once if it hung up, else by pings.
    pub(crate) fn notice_later(&mut self, one: usize, other: usize, at_once: bool) {
        let Some(Link { id, .. }) = self.link(one, other) else { return };
        let wait = if at_once { MS } else { self.nodes[other].rng.between(SECOND, PING + PING) };
        self.queue.push(self.now + wait, Next::Notice { one, other, link: id });
    }

    pub(crate) fn on_notice(&mut self, one: usize, other: usize, id: u64) {
        let Some(link) = self.link(one, other).filter(|link| link.id == id) else { return };
        let cut = self.is_blocked(one, other) || self.is_blocked(other, one);
        let down = [one, other].into_iter().chain(link.relay).any(|end| !self.nodes[end].is_up());
        let unrelayed = link.relay.is_some_and(|relay| {
            [one, other].into_iter().any(|end| self.link(relay, end).is_none())
        });
        if cut || down || unrelayed {
            self.disconnect(one, other);
        }
    }

    /// Every link that a fault may have cut is looked at later.
    pub(crate) fn notice_cuts(&mut self) {
        let links: Vec<(usize, usize)> = self.links.keys().copied().collect();
        for (one, other) in links {
            if self.is_blocked(one, other) || self.is_blocked(other, one) {
                self.notice_later(one, other, false);
            }
        }
    }

    /// Every link of a node, and those that it relays, are looked at later.
    pub(crate) fn notice_gone(&mut self, node: usize, at_once: bool) {
        for (one, other) in self.links_of(node) {
            self.notice_later(one, other, at_once);
        }
    }

    /// Everything that leads to a node, or through it, ends.
    pub(crate) fn drop_links(&mut self, node: usize) {
        for (one, other) in self.links_of(node) {
            self.disconnect(one, other);
        }
    }

    /// The links of a node, and those that it relays.
    fn links_of(&self, node: usize) -> Vec<(usize, usize)> {
        if !self.nodes.iter().any(|this| this.is_nat) {
            let contacts = self.nodes[node].contacts.iter();
            return contacts.map(|other| pair(node, *other)).collect();
        }
        let uses = |(ends, link): (&(usize, usize), &Link)| {
            (ends.0 == node || ends.1 == node || link.relay == Some(node)).then_some(*ends)
        };
        self.links.iter().filter_map(uses).collect()
    }

    /// A node keeps trying the nodes that it was given until it is connected to them.
    pub(crate) fn on_bootstrap(&mut self, node: usize, boot: u32, to: usize, wait: u64) {
        let connected = self.link(node, to).is_some();
        if !connected {
            self.dial(node, to);
        }
        let (next, after) = if connected {
            (if self.nodes.len() > FEW { REDIAL_LOOK_LARGE } else { REDIAL_LOOK }, REDIAL_FIRST)
        } else {
            (wait, (wait * 2).min(REDIAL_MAX))
        };
        let again = Next::Bootstrap { node, boot, to, wait: after };
        self.queue.push(self.now + next, again);
    }

    pub(crate) fn start_bootstrap(&mut self, node: usize) {
        let boot = self.nodes[node].boot;
        // In a large swarm not everybody is given the same nodes.
        let nodes = self.nodes.len();
        let given: BTreeSet<usize> = if nodes <= FEW {
            (0..(KEEPERS + 1).min(nodes)).collect()
        } else {
            let rng = &mut self.nodes[node].rng;
            let first = (nodes / 20).min(node.max(KEEPERS)) as u64;
            (0..=KEEPERS).map(|_| rng.below(first) as usize).collect()
        };
        for to in given.into_iter().filter(|to| *to != node) {
            let at = self.now + self.nodes[node].rng.below(100 * MS);
            self.queue.push(at, Next::Bootstrap { node, boot, to, wait: REDIAL_FIRST });
        }
    }

    pub(crate) fn publish(&mut self, node: usize, topic: Topic, data: Vec<u8>) {
        if !self.gossip.has(topic, node) {
            return;
        }
        self.numbers += 1;
        let this = &self.nodes[node];
        let (author, now) = ((this.id, node), self.now);
        let said = (topic, data.into());
        let message = Rc::new(Message::new(self.numbers, author, said, self.nodes.len()));
        message.hear(node, this.boot, now);
        for to in self.gossip.on(topic).publish(now, node, message.len()) {
            self.send(node, to, &message, 0);
        }
    }

    fn send(&mut self, from: usize, to: usize, message: &Rc<Message>, wait: u64) {
        // Most copies come too late to be taken.
        if self.active.is_empty() && message.is_heard(to, self.boots[to]) {
            return;
        }
        let Some(mut delay) = self.delay(from, to) else { return };
        delay += wait;
        if self.active.is_empty() {
            return self.post(from, to, message, self.now + delay);
        }
        let disorder = self.active.values().any(|fault| fault.kind == Kind::Disorder);
        if !disorder {
            return self.post(from, to, message, self.now + delay);
        }
        let rng: &mut Rng = &mut self.nodes[from].rng;
        // When the receiver's lease for it runs, and when it has long ended.
        let replay = rng.between(15, 150) * SECOND;
        delay += rng.below(2 * SECOND);
        let copies = 1 + u64::from(rng.percent(20));
        for copy in 0..copies {
            let message = Rc::clone(message);
            let at = self.now + delay + copy * replay;
            self.queue.push(at, Next::Gossip { to, from, message, is_replay: copy > 0 });
        }
    }

    /// A copy of a message is on its way, if it does not come too late to be taken.
    fn post(&mut self, from: usize, to: usize, message: &Rc<Message>, at: u64) {
        if message.is_wanted(to, self.boots[to], at) {
            let message = Rc::clone(message);
            self.queue.push(at, Next::Gossip { to, from, message, is_replay: false });
        }
    }

    pub(crate) fn on_gossip(
        &mut self,
        to: usize,
        from: usize,
        message: Rc<Message>,
        is_replay: bool,
    ) {
        if !self.gossip.has(message.topic, to) {
            return;
        }
        let (now, node) = (self.now, &self.nodes[to]);
        // What a node has forgotten is told to it once more.
        let is_news = match is_replay {
            true => message.is_heard(to, node.boot),
            false => node.is_up() && message.hear(to, node.boot, now),
        };
        if !node.is_up() || !is_news {
            return;
        }
        self.stats.messages += 1;
        let event = self.gossip_event(&message);
        // Whoever has forgotten a message passes it on once more, but not for ever.
        self.hearing = Some((message, from)).filter(|_| !is_replay);
        self.tell(to, event);
        self.hearing = None;
    }

    /// What a core is told of a message.
    pub(crate) fn gossip_event(&self, message: &Message) -> Event {
        let topic = message.topic.map_or(&self.topic, |model| &self.topic_names[model]);
        let (topic, word) = (Arc::clone(topic), message.word.clone());
        Event::Gossip { message: message.id, topic, author: message.author, word }
    }

    /// The core found the message that it was just told sound: it is passed on.
    pub(crate) fn pass_on(&mut self, node: usize) {
        let Some((message, from)) = self.hearing.clone() else { return };
        if let Some(passed) = self.passed.take() {
            return self.pass(node, &message, passed);
        }
        let author = Some(message.from);
        let (now, seed, nodes) = (self.now, self.options.seed, self.nodes.len());
        // Its word that it has the message has come.
        let has = |other: usize| {
            message.heard_at(other).is_some_and(|at| at + latency(seed, nodes, other, node) <= now)
        };
        let topic = message.topic;
        for to in self.gossip.on(topic).forward(now, node, (from, author), message.len(), has) {
            self.send(node, to, &message, 0);
        }
        for (to, wait) in self.gossip.on(topic).offered(node) {
            if message.heard_at(to).is_none() {
                self.gossip.on(topic).answer(node, to, message.len());
                // The offer, and the request.
                self.send(node, to, &message, wait + 2 * latency(seed, nodes, node, to));
            }
        }
    }

    /// What a node passes on was worked out ahead (`crew`).
    fn pass(&mut self, node: usize, message: &Rc<Message>, passed: Passed) {
        let now = self.now;
        for (to, delay) in passed.copies {
            self.post(node, to, message, now + delay);
        }
        for (to, wait) in passed.offers {
            if message.heard_at(to).is_none() {
                self.gossip.on(message.topic).answer(node, to, message.len());
                let trip = latency(self.options.seed, self.nodes.len(), node, to);
                self.send(node, to, message, wait + 2 * trip);
            }
        }
    }
}
