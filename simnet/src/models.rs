//! Large swarms with many models, each node interested in a few: who holds a model is known to those interested
//! in it, and what is lost is copied, though nobody knows most members.
//!
//! Each node has the manifests of some models; three of those interested in a model hold its objects at the start.
//! In the middle of the safety phase a tenth of the nodes die at once. Invariants: once nodes have met, nobody is
//! wrong about a holder for long; some time after the deaths nothing lacks copies that a node could make.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use doppler_ids::{PeerId, ShardId};
use doppler_mesh::core::Event;

use crate::node::Node;
use crate::options::{Options, SECOND, Scenario};
use crate::rng::{Rng, mix};
use crate::work::STARTS;
use crate::world::World;

/// Nodes for each model, and models in which each node is interested.
pub const NODES_PER_MODEL: usize = 10;
const INTERESTS: usize = 3;
/// Of those that are interested in a model, so many hold it at the start.
const HOLDERS: usize = 3;
/// One node in so many dies.
const MORTAL: usize = 10;
/// How long a node may be wrong about who holds a model, once nodes have met; and how long after the deaths
/// everything has its copies again.
const KNOWN_WITHIN: u64 = 90 * SECOND;
const HEALED_WITHIN: u64 = 120 * SECOND;
/// Nodes looked at each second.
const MANY: usize = 100;

/// Who is interested in what.
#[derive(Debug, Default)]
pub struct Interests {
    /// The models of each node, and the nodes of each model.
    pub of_node: Vec<BTreeSet<usize>>,
    pub of_model: Vec<Vec<usize>>,
    /// Since when a node is wrong about the holders of a model, without a break.
    wrong: BTreeMap<(usize, usize), u64>,
}

impl Interests {
    pub fn new(options: &Options, models: usize) -> Self {
        let mut this = Self { of_model: vec![Vec::new(); models], ..Self::default() };
        if options.scenario != Scenario::Models {
            return this;
        }
        for node in 0..options.nodes {
            let mut rng = Rng::fork(options.seed, "interests", node as u64);
            // The first so many are interested in one each, so that each model has somebody.
            let mut mine: BTreeSet<usize> = BTreeSet::from([node % models.max(1)]);
            while mine.len() < INTERESTS.min(models) {
                mine.insert(rng.below(models as u64) as usize);
            }
            for model in &mine {
                this.of_model[*model].push(node);
            }
            this.of_node.push(mine);
        }
        this
    }

    /// Those that hold a model at the start.
    pub fn holders(&self, seed: u64, model: usize) -> BTreeSet<usize> {
        let order = |node: &usize| mix(seed ^ mix((model << 32 | *node) as u64));
        let mut nodes = self.of_model[model].clone();
        nodes.sort_unstable_by_key(order);
        nodes.into_iter().take(HOLDERS).collect()
    }
}

/// The nodes that die.
pub const fn mortals(options: &Options) -> usize {
    options.nodes / MORTAL
}

/// One of them.
pub const fn mortal(options: &Options, number: usize) -> usize {
    (number * MORTAL + MORTAL / 2) % options.nodes
}

impl World {
    /// Those that copy a model's objects, as a node knows.
    pub(crate) fn helpers_of(&self, node: usize, model: usize) -> Option<Arc<BTreeSet<PeerId>>> {
        let core = self.nodes[node].core.as_ref()?;
        let is_models = self.options.scenario == Scenario::Models;
        is_models.then(|| Arc::new(core.helpers(self.instant(self.now), self.models[model].id)))
    }

    /// A node helps to keep the models in which it is interested.
    pub(crate) fn help(&mut self, node: usize) {
        if self.options.scenario == Scenario::Models {
            let models = self.nodes[node].registered.iter().map(|model| self.models[*model].id);
            let models = models.collect();
            self.tell(node, Event::Help(models));
        }
    }

    /// Rules of this scenario, once a second.
    pub(crate) fn check_models(&mut self) {
        let met = (self.nodes.len() as u64 / STARTS + 30) * SECOND;
        if self.options.scenario != Scenario::Models || self.now < met {
            return;
        }
        if self.news.nodes == 0 {
            self.begin_to_count();
        }
        let step = self.nodes.len().div_ceil(MANY);
        let first = (self.now / SECOND) as usize % step;
        for node in (first..self.nodes.len()).step_by(step) {
            if self.nodes[node].is_up() {
                for model in self.interests.of_node[node].clone() {
                    self.check_holders(node, model);
                }
            }
        }
        if self.healed.died > 0 && self.now > self.healed.died + HEALED_WITHIN {
            for model in 0..self.models.len() {
                self.check_model(model);
            }
        }
    }

    /// A node is wrong about who holds a model, for too long.
    fn check_holders(&mut self, node: usize, model: usize) {
        let Some(core) = &self.nodes[node].core else { return };
        let now = self.instant(self.now);
        let mut lens = core.lens(now, None);
        let of_model = &self.interests.of_model[model];
        let holds = |shard: ShardId| {
            let others = of_model.iter().filter(move |other| **other != node);
            let others = others.map(|other| &self.nodes[*other]);
            others
                .filter(move |other| other.is_up() && other.disk.is_whole(shard))
                .map(|other| other.id)
        };
        let wrong = self.models[model].objects.iter().find_map(|shard| {
            let kept = lens.kept((*shard, self.size(*shard)), self.replicas);
            let (known, held): (BTreeSet<PeerId>, BTreeSet<PeerId>) =
                (kept.holders.iter().copied().collect(), holds(*shard).collect());
            (known != held).then(|| (*shard, known.len(), held.difference(&known).count()))
        });
        let Some((shard, known, missed)) = wrong else {
            self.interests.wrong.remove(&(node, model));
            return;
        };
        let since = *self.interests.wrong.entry((node, model)).or_insert(self.now);
        if self.now > since + KNOWN_WITHIN {
            let shard = shard.short();
            let what = format!(
                "node {node} counts {known} holders of {shard} of model {model}, and misses {missed}"
            );
            self.violate("holders", what);
        }
    }

    /// An object of a model lacks copies that somebody interested could make.
    fn check_model(&mut self, model: usize) {
        let of_model = &self.interests.of_model[model];
        let up = || of_model.iter().map(|node| &self.nodes[*node]).filter(|node| node.is_up());
        let lacks = self.models[model].objects.iter().find(|shard| {
            let size = self.size(**shard);
            let could = |node: &Node| {
                !node.disk.is_whole(**shard)
                    && node.healing.as_ref().is_some_and(|healing| healing.room() >= size)
            };
            let copies = up().filter(|node| node.disk.is_whole(**shard)).count();
            copies > 0 && copies < self.replicas.min && up().any(could)
        });
        if let Some(shard) = lacks.copied() {
            let what = format!("{} of model {model} has too few copies", shard.short());
            self.violate("lack", what);
        }
    }
}
