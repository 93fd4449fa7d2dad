//! How gossip is passed on: a model of gossipsub as the swarm runs it (libp2p-gossipsub with its
//! defaults; messages are judged before they are passed on).
//!
//! An author sends to all its peers. Whoever finds a message sound passes it on to its mesh, 5 to 11
//! of its peers, chosen at heartbeats; both ends agree on it. Whoever has a message larger than
//! [`LARGE`] tells its mesh that it needs no further copy. Each heartbeat offers the ids of late
//! messages to some peers outside the mesh. That costs bytes; here only a peer that is in nobody's
//! mesh asks for one: a newcomer whose peers have all they want.
//!
//! Pure: the time is an argument. Level 2 measures how far the model is off (`level2::relaying`).
//! Invariant: a node's mesh is a subset of its peers, and if one has another in its mesh, so does the other.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Index, IndexMut};

use crate::options::SECOND;
use crate::rng::Rng;

/// Gossipsub's defaults: a mesh smaller than `LOW` or as large as `HIGH` is brought to `MESH` peers,
/// of which `OUTBOUND` were dialled by the node itself.
const LOW: usize = 5;
const MESH: usize = 6;
const HIGH: usize = 12;
const OUTBOUND: usize = 2;
/// Heartbeats, the first of them, and how long a pruned peer is not grafted again.
const HEARTBEAT: u64 = SECOND;
const FIRST_HEARTBEAT: u64 = 5 * SECOND;
const BACKOFF: u64 = 60 * SECOND;
/// Peers outside the mesh to which ids are offered: this many, or one in four of them; and at how
/// many heartbeats.
const LAZY: usize = 6;
const OFFERS: u64 = 3;

/// Bytes of one frame of the multiplexer, of the encryption, and of a length.
const FRAME: u64 = 12 + 18 + 2;
/// Bytes of a topic's name (`doppler_mesh::topic`), a peer id, and a message's id: the author in
/// base58, and a number.
const TOPIC: u64 = 81;
const PEER: u64 = 38;
const ID: u64 = 52 + 20;
/// What a message has beside its data: author, number, topic and signature, with their tags.
const ENVELOPE: u64 = (2 + PEER) + (2 + 8) + (2 + TOPIC) + (2 + 64) + 6;
/// Messages of more bytes than this, with their envelope, are announced to the mesh before they
/// are passed on.
pub const LARGE: u64 = 1000;

/// What a node has sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Copies of gossip messages.
    pub copies: u64,
    /// Bytes of those, and of what meshes say to keep going.
    pub bytes: u64,
}

/// A connected peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Peer {
    node: usize,
    /// This node dialled it.
    is_outbound: bool,
}

/// One node's part in a topic.
#[derive(Default)]
pub struct Relay {
    rng: Rng,
    peers: Vec<Peer>,
    mesh: Vec<usize>,
    /// Those of the peers that are in nobody's mesh; and to whom this node is such a peer.
    outsiders: BTreeSet<usize>,
    shown: Vec<usize>,
    /// Until when a peer is not grafted.
    backoff: BTreeMap<usize, u64>,
    beat: u64,
    /// Until when ids are offered at each heartbeat.
    offers_until: u64,
    sent: Traffic,
}

/// The parts of the nodes of a topic, by node.
#[allow(clippy::vec_box)] // exchanged by pointer
enum Relays {
    /// Every node takes part.
    All(Vec<Box<Relay>>),
    /// Those take part that joined.
    Joined(BTreeMap<usize, Box<Relay>>),
}

impl Index<usize> for Relays {
    type Output = Box<Relay>;
    fn index(&self, node: usize) -> &Box<Relay> {
        match self {
            Self::All(relays) => &relays[node],
            Self::Joined(relays) => &relays[&node],
        }
    }
}

impl IndexMut<usize> for Relays {
    fn index_mut(&mut self, node: usize) -> &mut Box<Relay> {
        match self {
            Self::All(relays) => &mut relays[node],
            Self::Joined(relays) => relays.entry(node).or_default(),
        }
    }
}

/// Every node's part in passing on what is said on one topic.
pub struct Gossip {
    relays: Relays,
}

/// Bytes of a message with so many bytes of data, once sent.
const fn copy_bytes(data: usize) -> u64 {
    FRAME + ENVELOPE + data as u64
}

/// Whether a message with so many bytes of data is announced before it is passed on.
pub const fn is_large(data: usize) -> bool {
    ENVELOPE + data as u64 > LARGE
}

impl Gossip {
    pub fn new(seed: u64, nodes: usize) -> Self {
        let relay = |node: usize| Box::new(Relay::new(Rng::fork(seed, "gossip", node as u64)));
        Self { relays: Relays::All((0..nodes).map(relay).collect()) }
    }

    /// A topic in which nobody takes part yet.
    pub const fn empty() -> Self {
        Self { relays: Relays::Joined(BTreeMap::new()) }
    }

    /// A node takes part from now on.
    pub fn join(&mut self, now: u64, node: usize, rng: Rng) {
        *self.relays[node] = Relay { beat: now + HEARTBEAT, ..Relay::new(rng) };
    }

    /// A node takes part no more. Returns what it has sent.
    pub fn leave(&mut self, node: usize) -> Traffic {
        let peers: Vec<usize> = self.relays[node].peers.iter().map(|peer| peer.node).collect();
        for peer in peers {
            self.disconnect(node, peer);
        }
        match &mut self.relays {
            Relays::All(_) => Traffic::default(),
            Relays::Joined(relays) => {
                relays.remove(&node).map_or_else(Traffic::default, |relay| relay.sent)
            }
        }
    }

    pub fn sent(&self, node: usize) -> Traffic {
        self.relays[node].sent
    }

    /// Those to which a node passes messages on.
    #[cfg(test)]
    pub fn mesh(&self, node: usize) -> &[usize] {
        &self.relays[node].mesh
    }

    /// A node starts. It is connected to nobody.
    pub fn begin(&mut self, now: u64, node: usize) {
        let relay = &mut self.relays[node];
        relay.backoff.clear();
        relay.beat = now + FIRST_HEARTBEAT;
    }

    /// Two nodes are connected, and hear of each other's topic.
    pub fn connect(&mut self, now: u64, dialler: usize, listener: usize) {
        for (one, other, is_outbound) in [(dialler, listener, true), (listener, dialler, false)] {
            let relay = &mut self.relays[one];
            relay.peers.retain(|peer| peer.node != other);
            relay.peers.push(Peer { node: other, is_outbound });
        }
        for (one, other) in [(dialler, listener), (listener, dialler)] {
            if self.relays[one].mesh.len() < LOW && self.may_graft(now, one, other) {
                self.graft(now, one, other);
            }
        }
        self.look(dialler);
        self.look(listener);
    }

    /// A node's mesh or peers may have changed.
    fn look(&mut self, node: usize) {
        let relay = &mut self.relays[node];
        let is_outside = relay.mesh.is_empty() && !relay.peers.is_empty();
        if !is_outside && relay.shown.is_empty() {
            return;
        }
        for peer in std::mem::take(&mut relay.shown) {
            self.relays[peer].outsiders.remove(&node);
        }
        if is_outside {
            let peers: Vec<usize> = self.relays[node].peers.iter().map(|peer| peer.node).collect();
            for peer in &peers {
                self.relays[*peer].outsiders.insert(node);
            }
            self.relays[node].shown = peers;
        }
    }

    pub fn disconnect(&mut self, one: usize, other: usize) {
        for (one, other) in [(one, other), (other, one)] {
            let relay = &mut self.relays[one];
            relay.peers.retain(|peer| peer.node != other);
            relay.mesh.retain(|peer| *peer != other);
            self.look(one);
        }
    }

    fn may_graft(&self, now: u64, one: usize, other: usize) -> bool {
        let relay = &self.relays[one];
        !relay.mesh.contains(&other) && relay.backoff.get(&other).is_none_or(|until| *until <= now)
    }

    fn is_outbound(&self, one: usize, other: usize) -> bool {
        self.relays[one].peers.iter().any(|peer| peer.node == other && peer.is_outbound)
    }

    /// One asks the other to be in its mesh; the other may refuse.
    fn graft(&mut self, now: u64, one: usize, other: usize) {
        let is_full = self.relays[other].mesh.len() >= HIGH && !self.is_outbound(other, one);
        if is_full || !self.may_graft(now, other, one) {
            self.relays[one].backoff.insert(other, now + BACKOFF);
            return;
        }
        for (one, other) in [(one, other), (other, one)] {
            self.relays[one].mesh.push(other);
            self.look(one);
        }
    }

    fn prune(&mut self, now: u64, one: usize, other: usize) {
        for (one, other) in [(one, other), (other, one)] {
            let relay = &mut self.relays[one];
            relay.mesh.retain(|peer| *peer != other);
            relay.backoff.insert(other, now + BACKOFF);
            self.look(one);
        }
    }

    /// Grafts so many of a node's peers, drawn from those that `may` allows.
    fn graft_some(&mut self, now: u64, node: usize, count: usize, may: impl Fn(&Peer) -> bool) {
        let peers = self.relays[node].peers.iter().filter(|peer| may(peer)).map(|peer| peer.node);
        let mut peers: Vec<usize> = peers.filter(|peer| self.may_graft(now, node, *peer)).collect();
        for _ in 0..count.min(peers.len()) {
            let pick = self.relays[node].rng.below(peers.len() as u64) as usize;
            let peer = peers.swap_remove(pick);
            self.graft(now, node, peer);
        }
    }

    /// The heartbeats that are due. Between them nothing changes that a node could notice, so they may
    /// come late, when it is about to send.
    fn keep_up(&mut self, now: u64, node: usize) {
        let relay = &mut self.relays[node];
        if now < relay.beat {
            return;
        }
        relay.beat += (now - relay.beat) / HEARTBEAT * HEARTBEAT + HEARTBEAT;
        relay.backoff.retain(|_, until| *until > now);
        if relay.mesh.len() < LOW {
            let lacking = MESH - relay.mesh.len();
            self.graft_some(now, node, lacking, |_| true);
        }
        self.shrink(now, node);
        let outbound = self.outbound(node);
        if self.relays[node].mesh.len() >= LOW && outbound < OUTBOUND {
            self.graft_some(now, node, OUTBOUND - outbound, |peer| peer.is_outbound);
        }
    }

    fn outbound(&self, node: usize) -> usize {
        self.relays[node].outbound()
    }

    /// A mesh that has grown too large loses peers until it has its size.
    fn shrink(&mut self, now: u64, node: usize) {
        let mut mesh = self.relays[node].mesh.clone();
        if mesh.len() < HIGH {
            return;
        }
        let (mut excess, mut outbound) = (mesh.len() - MESH, self.outbound(node));
        while excess > 0 && !mesh.is_empty() {
            let pick = self.relays[node].rng.below(mesh.len() as u64) as usize;
            let peer = mesh.swap_remove(pick);
            if self.is_outbound(node, peer) {
                if outbound <= OUTBOUND {
                    continue;
                }
                outbound -= 1;
            }
            self.prune(now, node, peer);
            excess -= 1;
        }
    }

    /// Those of a node's peers that are in nobody's mesh, if they are offered the id of a message that it
    /// has now, and how long from now.
    pub fn offered(&mut self, node: usize) -> Vec<(usize, u64)> {
        self.relays[node].offered()
    }

    /// A node has asked for a message that it was offered, and gets it.
    pub fn answer(&mut self, from: usize, to: usize, data: usize) {
        self.relays[to].sent.bytes += FRAME + ID + 6;
        let sent = &mut self.relays[from].sent;
        sent.copies += 1;
        sent.bytes += copy_bytes(data);
    }

    /// A node writes a message. Returns those to whom it sends it.
    pub fn publish(&mut self, now: u64, node: usize, data: usize) -> Vec<usize> {
        self.keep_up(now, node);
        let relay = &mut self.relays[node];
        relay.offer(now);
        let count = relay.peers.len() as u64;
        relay.sent.copies += count;
        relay.sent.bytes += count * copy_bytes(data);
        relay.peers.iter().map(|peer| peer.node).collect()
    }

    /// A node has found a message sound that came from `from`. Returns those to whom it passes it on:
    /// its mesh but for that peer, the author, and those that have told it that they have it.
    pub fn forward(
        &mut self,
        now: u64,
        node: usize,
        way: (usize, Option<usize>),
        data: usize,
        has: impl Fn(usize) -> bool,
    ) -> Vec<usize> {
        self.keep_up(now, node);
        self.relays[node].forward(now, way, data, has)
    }

    /// Exchanges a node's part for another, so that the node can be seen to elsewhere.
    pub fn swap(&mut self, node: usize, relay: &mut Box<Relay>) {
        std::mem::swap(&mut self.relays[node], relay);
    }
}

impl Relay {
    fn new(rng: Rng) -> Self {
        Self { rng, ..Self::default() }
    }

    fn outbound(&self) -> usize {
        let is_outbound =
            |node: &&usize| self.peers.iter().any(|peer| peer.node == **node && peer.is_outbound);
        self.mesh.iter().filter(is_outbound).count()
    }

    /// Whether a heartbeat now would change the mesh.
    fn is_restless(&self, now: u64) -> bool {
        let is_free = |peer: &Peer| {
            let node = peer.node;
            !self.mesh.contains(&node) && self.backoff.get(&node).is_none_or(|until| *until <= now)
        };
        let size = self.mesh.len();
        let lacks =
            |may: &dyn Fn(&Peer) -> bool| self.peers.iter().any(|peer| may(peer) && is_free(peer));
        match size {
            ..LOW => lacks(&|_| true),
            LOW..HIGH => self.outbound() < OUTBOUND && lacks(&|peer| peer.is_outbound),
            _ => true,
        }
    }

    /// The heartbeats that are due, if they change nothing for others. False if they do.
    pub fn keep_up_alone(&mut self, now: u64) -> bool {
        if now < self.beat {
            return true;
        }
        if self.is_restless(now) {
            return false;
        }
        self.backoff.retain(|_, until| *until > now);
        self.beat += (now - self.beat) / HEARTBEAT * HEARTBEAT + HEARTBEAT;
        true
    }

    /// Peers outside the mesh, and to how many of them it offers ids at a heartbeat.
    fn lazy(&self) -> (u64, u64) {
        let outside = self.peers.len() - self.mesh.len();
        (outside as u64, outside.min(LAZY.max(outside / 4)) as u64)
    }

    /// The bytes that offering a message's id costs, once for each message.
    fn offer(&mut self, now: u64) {
        let (_, lazy) = self.lazy();
        let until = now + OFFERS * HEARTBEAT;
        let beats = (until - self.offers_until.max(now)) as f64 / HEARTBEAT as f64;
        self.offers_until = until;
        let frames = (beats * (lazy * (FRAME + TOPIC + 6)) as f64) as u64;
        self.sent.bytes += frames + OFFERS * lazy * (ID + 2);
    }

    /// [`Gossip::offered`].
    pub fn offered(&mut self) -> Vec<(usize, u64)> {
        if self.outsiders.is_empty() {
            return Vec::new();
        }
        let (outside, lazy) = self.lazy();
        let mut offered = Vec::new();
        for other in &self.outsiders {
            let rng = &mut self.rng;
            let first = rng.below(HEARTBEAT);
            let beat = (0..OFFERS).find(|_| rng.below(outside) < lazy);
            offered.extend(beat.map(|beat| (*other, first + beat * HEARTBEAT)));
        }
        offered
    }

    /// [`Gossip::forward`], once the heartbeats are done.
    pub fn forward(
        &mut self,
        now: u64,
        (from, author): (usize, Option<usize>),
        data: usize,
        has: impl Fn(usize) -> bool,
    ) -> Vec<usize> {
        self.offer(now);
        let others = self.mesh.iter().copied();
        let mut others: Vec<usize> =
            others.filter(|other| *other != from && Some(*other) != author).collect();
        if is_large(data) {
            self.sent.bytes += others.len() as u64 * (FRAME + ID + 6);
            others.retain(|other| !has(*other));
        }
        self.sent.copies += others.len() as u64;
        self.sent.bytes += others.len() as u64 * copy_bytes(data);
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_symmetric(gossip: &Gossip) -> bool {
        let Relays::All(relays) = &gossip.relays else { return false };
        (0..relays.len())
            .all(|node| gossip.mesh(node).iter().all(|peer| gossip.mesh(*peer).contains(&node)))
    }

    #[test]
    fn meshes_have_five_to_eleven_peers_and_both_ends_agree() {
        let nodes = 60;
        let mut gossip = Gossip::new(1, nodes);
        let mut rng = Rng::new(5);
        for node in 0..nodes {
            gossip.begin(0, node);
        }
        for node in 0..nodes {
            for other in node + 1..nodes {
                let (dialler, listener) =
                    if rng.percent(50) { (node, other) } else { (other, node) };
                gossip.connect(0, dialler, listener);
            }
        }
        for second in 5..70 {
            for node in 0..nodes {
                gossip.publish(second * SECOND, node, 10);
            }
            assert!(is_symmetric(&gossip));
        }
        for node in 0..nodes {
            let (mesh, outbound) = (gossip.mesh(node).len(), gossip.outbound(node));
            assert!((LOW..HIGH).contains(&mesh) && outbound >= OUTBOUND, "{mesh}, {outbound}");
        }
        gossip.disconnect(0, gossip.mesh(0)[0]);
        assert!(is_symmetric(&gossip));
    }

    #[test]
    fn a_newcomer_that_nobody_wants_in_a_mesh_is_offered_messages() {
        let mut gossip = Gossip::new(1, 30);
        for other in 1..29 {
            gossip.connect(0, other, 0);
            gossip.connect(0, other, other % 28 + 1);
        }
        assert_eq!(gossip.mesh(0).len(), HIGH, "whoever comes next is not let in");
        assert_eq!(gossip.offered(0), []);
        gossip.connect(0, 29, 0);
        assert_eq!(gossip.mesh(29), [0; 0]);
        let times: Vec<u64> = (0..100).flat_map(|_| gossip.offered(0)).map(|(_, at)| at).collect();
        assert!(times.len() > 40 && times.iter().all(|at| *at < OFFERS * HEARTBEAT), "{times:?}");
        assert_eq!(gossip.offered(3), [], "it is no peer of the newcomer");
    }

    #[test]
    fn an_author_tells_all_and_others_their_mesh_but_not_who_has_it() {
        let mut gossip = Gossip::new(1, 20);
        for other in 1..20 {
            gossip.connect(0, 0, other);
        }
        assert_eq!(gossip.publish(0, 0, 100).len(), 19);
        let sent = gossip.sent(0);
        assert_eq!(sent.copies, 19);
        assert!(sent.bytes > 19 * (100 + ENVELOPE), "{sent:?}");
        let mesh = gossip.mesh(0).to_vec();
        let (from, author) = (mesh[0], mesh[1]);
        let passed = gossip.forward(0, 0, (from, Some(author)), 100, |_| true);
        assert_eq!(passed.len(), mesh.len() - 2);
        assert!(!passed.contains(&from) && !passed.contains(&author));
        let large = gossip.forward(0, 0, (from, None), 5000, |peer| peer == author);
        assert_eq!(large.len(), mesh.len() - 2, "whoever said that it has it gets no copy");
        assert!(is_large(5000) && !is_large(500));
    }
}
