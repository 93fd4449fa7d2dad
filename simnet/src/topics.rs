//! The topics of a swarm: its own, in which every node takes part, and in a crowd one for each model that nodes
//! are interested in.
//!
//! Invariant: two nodes that are connected and in the same topic are each other's peers there.

use std::collections::{BTreeMap, BTreeSet};

use crate::gossip::{Gossip, Relay, Traffic};
use crate::rng::{Rng, mix};

/// A topic: a model's, by its number, or the swarm's.
pub type Topic = Option<usize>;

/// How gossip is passed on, on all topics.
pub struct Topics {
    seed: u64,
    swarm: Gossip,
    models: BTreeMap<usize, Gossip>,
    /// The models whose topics each node is in, and what it sent on those that it has left.
    joined: Vec<BTreeSet<usize>>,
    left: Vec<Traffic>,
}

impl Topics {
    pub fn new(seed: u64, nodes: usize) -> Self {
        Self {
            seed,
            swarm: Gossip::new(seed, nodes),
            models: BTreeMap::new(),
            joined: vec![BTreeSet::new(); nodes],
            left: vec![Traffic::default(); nodes],
        }
    }

    /// One topic.
    pub fn on(&mut self, topic: Topic) -> &mut Gossip {
        match topic {
            None => &mut self.swarm,
            Some(model) => self.models.entry(model).or_insert_with(Gossip::empty),
        }
    }

    /// Whether a node takes part in a topic.
    pub fn has(&self, topic: Topic, node: usize) -> bool {
        topic.is_none_or(|model| self.joined[node].contains(&model))
    }

    /// The models whose topics a node is in.
    pub fn joined(&self, node: usize) -> &BTreeSet<usize> {
        &self.joined[node]
    }

    /// What a node has sent on all topics.
    pub fn sent(&self, node: usize) -> Traffic {
        let near = self.joined[node].iter().filter_map(|model| self.models.get(model));
        let near = near.map(|gossip| gossip.sent(node));
        let all = near.chain([self.swarm.sent(node), self.left[node]]);
        all.fold(Traffic::default(), |sum, one| Traffic {
            copies: sum.copies + one.copies,
            bytes: sum.bytes + one.bytes,
        })
    }

    /// A node starts. It is connected to nobody.
    pub fn begin(&mut self, now: u64, node: usize) {
        for model in self.joined[node].clone() {
            self.leave(node, model);
        }
        self.swarm.begin(now, node);
    }

    pub fn connect(&mut self, now: u64, dialler: usize, listener: usize) {
        self.swarm.connect(now, dialler, listener);
        for model in self.joined[dialler].intersection(&self.joined[listener]) {
            if let Some(gossip) = self.models.get_mut(model) {
                gossip.connect(now, dialler, listener);
            }
        }
    }

    pub fn disconnect(&mut self, one: usize, other: usize) {
        self.swarm.disconnect(one, other);
        for model in self.joined[one].intersection(&self.joined[other]) {
            if let Some(gossip) = self.models.get_mut(model) {
                gossip.disconnect(one, other);
            }
        }
    }

    /// A node joins a model's topic, connected to these peers.
    pub fn join(&mut self, now: u64, node: usize, model: usize, peers: &BTreeSet<usize>) {
        if !self.joined[node].insert(model) {
            return;
        }
        let rng = Rng::fork(self.seed ^ mix(model as u64 + 1), "topic", node as u64);
        self.on(Some(model)).join(now, node, rng);
        for peer in peers {
            if self.joined[*peer].contains(&model) {
                self.on(Some(model)).connect(now, node, *peer);
            }
        }
    }

    pub fn leave(&mut self, node: usize, model: usize) {
        if self.joined[node].remove(&model) {
            let Traffic { copies, bytes } = self.on(Some(model)).leave(node);
            self.left[node].copies += copies;
            self.left[node].bytes += bytes;
        }
    }

    /// Exchanges a node's part in a topic for another, so that the node can be seen to elsewhere.
    pub fn swap(&mut self, topic: Topic, node: usize, relay: &mut Box<Relay>) {
        self.on(topic).swap(node, relay);
    }
}
