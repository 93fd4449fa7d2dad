//! Large swarms in which nothing goes wrong: what gossip costs each node, how much it remembers, and
//! how long news take to reach everybody.
//!
//! Nodes join over some time. There is a model for every two hundred of them, and each node is
//! interested in one. When all have joined and a while has passed, some nodes publish a model each,
//! and what is said is counted to the end.

use std::collections::BTreeMap;

use doppler_ids::ModelId;
use doppler_mesh::core::Event;
use doppler_store::signature::SignedModel;

use crate::check::Stats;
use crate::gossip::Traffic;
use crate::options::{MS, SECOND};
use crate::queue::Next;
use crate::rng::Rng;
use crate::world::World;

/// Nodes for each model.
pub const NODES_PER_MODEL: usize = 200;
/// Models published while nobody publishes anything else.
const NEWS: u64 = 8;
/// The time before the first is published, from the last join on, and between two.
const QUIET: u64 = 60 * SECOND;
const APART: u64 = 10 * SECOND;

/// How fast news were, and what the swarm cost from when it was complete.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct News {
    /// When each model was published.
    began: BTreeMap<ModelId, u64>,
    /// How long each of them took to reach each other node, in nanoseconds.
    pub took: Vec<u64>,
    pub nodes: usize,
    /// From when costs are counted, and what had been counted before.
    from: u64,
    before: (Stats, Traffic),
    /// Of the time since then, for one node and second.
    pub heard: f64,
    pub sent: f64,
    pub sent_bytes: f64,
    /// The most members and known peers that any node remembers at the end.
    pub members: usize,
    pub known: usize,
}

impl News {
    pub(crate) fn learned(&mut self, now: u64, signed: &SignedModel) {
        if let Some(began) = self.began.get(&signed.model)
            && now > *began
        {
            self.took.push(now - began);
        }
    }

    /// The time within which so many of a thousand deliveries were made, in seconds; `None` if some
    /// were not made at all.
    pub fn within(&self, of_thousand: usize) -> Option<f64> {
        let all = self.began.len() * self.nodes.saturating_sub(1);
        let mut took = self.took.clone();
        took.sort_unstable();
        let at = (all * of_thousand).div_ceil(1000).checked_sub(1)?;
        took.get(at).map(|nanos| *nanos as f64 / SECOND as f64)
    }
}

impl std::fmt::Display for News {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = |time: Option<f64>| time.map_or("never".to_owned(), |t| format!("{t:.2} s"));
        write!(f, "{} nodes: ", self.nodes)?;
        if !self.began.is_empty() {
            let [half, most, all] = [500, 990, 1000].map(|part| seconds(self.within(part)));
            write!(f, "news reach half in {half}, 99 % in {most}, all in {all}; ")?;
        }
        write!(
            f,
            "a node and second: {:.2} messages heard, {:.2} sent, {:.0} bytes; at most {} members and {} \
             peers remembered",
            self.heard, self.sent, self.sent_bytes, self.members, self.known,
        )
    }
}

impl World {
    /// When a node of a crowd joins: one after another, within a third of the time.
    pub(crate) fn joins_at(&self, node: usize) -> u64 {
        self.options.end() / 3 / self.options.nodes.max(1) as u64 * node as u64
    }

    pub(crate) fn plan_news(&mut self) {
        let mut rng = Rng::fork(self.options.seed, "news", 0);
        let nodes = self.nodes.len();
        self.news.nodes = nodes;
        self.news.from = self.options.end() / 3 + QUIET;
        for number in 0..NEWS {
            let node = rng.below(nodes as u64) as usize;
            // Not in step with anybody's round.
            let at = self.news.from + number * APART + rng.below(APART);
            if at + APART < self.options.end() {
                self.queue.push(at, Next::News { node, number });
            }
        }
    }

    /// From now on it is counted what the swarm costs.
    pub(crate) fn begin_to_count(&mut self) {
        self.news.before = (self.stats, self.traffic());
        (self.news.from, self.news.nodes) = (self.now, self.nodes.len());
    }

    pub(crate) fn publish_in_crowd(&mut self, node: usize, number: u64) {
        if number == 0 {
            self.begin_to_count();
        }
        let mut rng = Rng::fork(self.options.seed, "news", number + 1);
        let mut bytes = || {
            let mut out = [0; 32];
            for chunk in out.chunks_mut(8) {
                chunk.copy_from_slice(&rng.next().to_le_bytes());
            }
            out
        };
        let (seed, model) = (bytes(), ModelId::from(bytes()));
        let Ok(signed) = SignedModel::sign(&seed, model, "news", 1000) else { return };
        self.news.began.insert(model, self.now);
        self.tell(node, Event::Publish(signed));
    }

    /// What all nodes have sent.
    fn traffic(&self) -> Traffic {
        let mut all = Traffic::default();
        for node in 0..self.nodes.len() {
            let Traffic { copies, bytes } = self.gossip.sent(node);
            all.copies += copies;
            all.bytes += bytes;
        }
        all
    }

    /// At the end of a run.
    pub(crate) fn count_cost(&mut self) {
        let sent = self.traffic();
        let Self { news, stats, now, nodes, .. } = self;
        let time = (now.saturating_sub(news.from)).max(MS) as f64 / SECOND as f64;
        let each = |now: u64, before: u64| (now - before) as f64 / time / nodes.len() as f64;
        news.heard = each(stats.messages, news.before.0.messages);
        news.sent = each(sent.copies, news.before.1.copies);
        news.sent_bytes = each(sent.bytes, news.before.1.bytes);
        let fills = |what: &str| {
            let cores = nodes.iter().filter_map(|node| node.core.as_ref());
            let fills = cores.flat_map(|core| core.census());
            fills.filter(|fill| fill.what == what).map(|fill| fill.len).max().unwrap_or(0)
        };
        (news.members, news.known) = (fills("members"), fills("known peers"));
    }
}
