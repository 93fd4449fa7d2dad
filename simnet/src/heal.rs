//! Healing in the simulated swarm: each node's decider looks every second and when a copy has ended, as the
//! running node's does; copies are reads of whole objects, and a node that is to leave for good waits until others
//! hold what it holds.

use std::collections::BTreeSet;

use doppler_ids::ShardId;
use doppler_mesh::core::{Event, HealAction, HealOptions, HealView, Healing, Kept, Offer, ReadId};
use doppler_store::Priority;

use crate::node::{Node, Purpose};
use crate::options::{MS, SECOND, Scenario};
use crate::queue::Next;
use crate::world::World;

/// How soon after a look the next may follow because a copy has ended: `LOOK_AFTER_COPY` of `node::healing`.
const LOOK_AFTER_COPY: u64 = 100 * MS;

/// What became of a swarm in which nodes died at once. Times are virtual nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Healed {
    /// When the last node died.
    pub died: u64,
    /// When nobody counted on any of them any more.
    pub noticed: u64,
    /// When the last copy was durable.
    pub healed: u64,
    /// Bytes of copies made, and of those that were missing when the last node died.
    pub moved: u64,
    pub least: u64,
    /// Objects of which every copy died.
    pub lost: u64,
    /// Bytes a second that the survivors' lines take together.
    pub joint: u64,
}

impl std::fmt::Display for Healed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since = |at: u64| at.saturating_sub(self.died) as f64 / SECOND as f64;
        write!(
            f,
            "noticed in {:.1} s, healed in {:.1} s; moved {:.2} GB of {:.2} at least, which take {:.1} s",
            since(self.noticed),
            since(self.healed),
            self.moved as f64 / 1e9,
            self.least as f64 / 1e9,
            self.least as f64 / self.joint.max(1) as f64,
        )
    }
}

impl World {
    pub(crate) fn new_healing(&self, node: usize) -> Healing {
        let Node { id, replica_budget, .. } = self.nodes[node];
        Healing::new(id, HealOptions { budget: replica_budget, rate: None })
    }

    /// Everything of the models that a node knows, as its core sees it.
    fn kept(&self, node: usize) -> Vec<Kept> {
        let (now, this) = (self.instant(self.now), &self.nodes[node]);
        let Some(core) = &this.core else { return Vec::new() };
        let since = this.leaves_since.map(|since| self.instant(since));
        let shards = this.registered.iter().flat_map(|number| {
            let (model, helpers) = (&self.models[*number], self.helpers_of(node, *number));
            let objects = model.objects.iter().copied().chain([model.id.manifest()]);
            objects.map(move |shard| (shard, helpers.clone()))
        });
        let mut lens = core.lens(now, since);
        let kept = |(shard, helpers)| Kept {
            is_here: this.disk.is_whole(shard),
            is_replica: this.disk.is_replica(shard),
            helpers,
            ..lens.kept((shard, self.size(shard)), self.replicas)
        };
        shards.map(kept).collect()
    }

    /// A copy has ended: the decider looks for the next one.
    pub(crate) fn heal_soon(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        if !std::mem::replace(&mut this.looks.is_due, true) {
            let at = self.now.max(this.looks.last + LOOK_AFTER_COPY);
            self.queue.push(at, Next::Heal { node, boot: this.boot });
        }
    }

    /// A node's decider looks at the swarm.
    pub(crate) fn heal(&mut self, node: usize) {
        self.nodes[node].looks.last = self.now;
        let objects = self.kept(node);
        let (now, this) = (self.instant(self.now), &mut self.nodes[node]);
        let Some((core, healing)) = this.core.as_ref().zip(this.healing.as_mut()) else { return };
        let volunteers = core.volunteers(now);
        let is_leaving = this.leaves_since.is_some();
        let is_busy = this.reads.values().any(|reading| reading.is_token);
        let view = HealView { objects: &objects, volunteers: &volunteers, is_busy, is_leaving };
        let actions = healing.look(now, &view);
        let room = if is_leaving { 0 } else { healing.room() };
        for action in actions {
            match action {
                // The pull brings it already; the store reads an object once.
                HealAction::Copy { shard, .. } if self.is_pulling(node, shard) => {
                    if let Some(healing) = self.nodes[node].healing.as_mut() {
                        healing.failed(now, shard);
                    }
                }
                HealAction::Copy { shard, .. } => {
                    self.begin_whole(node, shard, Priority::Bulk, Purpose::Heal);
                }
                HealAction::Stop(shard) => {
                    let mine = |(read, reading): (&ReadId, &crate::node::Reading)| {
                        (reading.purpose == Purpose::Heal && reading.shard == shard)
                            .then_some(*read)
                    };
                    if let Some(read) = self.nodes[node].reads.iter().find_map(mine) {
                        self.drop_read(node, read);
                    }
                }
                HealAction::Drop(shard) => {
                    self.evict(node, shard);
                    self.holdings_changed(node);
                }
            }
        }
        self.tell(node, Event::Offer(Offer { room, is_leaving }));
        let since = self.nodes[node].leaves_since.map(|since| self.instant(since));
        if since.is_some_and(|since| Healing::may_leave(now, since, &objects)) {
            self.depart(node);
        }
    }

    fn is_pulling(&self, node: usize, shard: ShardId) -> bool {
        let mut reads = self.nodes[node].reads.values();
        reads.any(|reading| reading.purpose == Purpose::Pull && reading.shard == shard)
    }

    /// What may not be evicted, because too few others hold it.
    pub(crate) fn spared(&self, node: usize) -> BTreeSet<ShardId> {
        let own = self.nodes[node].id;
        let stays = |kept: &Kept| kept.is_here && !kept.may_go(own);
        self.kept(node).into_iter().filter(stays).map(|kept| kept.shard).collect()
    }

    /// A node dies, and its disk with it.
    pub(crate) fn die(&mut self, node: usize) {
        for shard in self.nodes[node].disk.whole().clone() {
            self.nodes[node].disk.evict(shard);
        }
        self.nodes[node].is_gone = true;
        self.stop(node, false);
        self.healed.died = self.now;
        // Of very many, it is not counted.
        if self.options.scenario == Scenario::Models {
            return;
        }
        let copies =
            |shard: &ShardId| self.nodes.iter().filter(|this| this.disk.is_whole(*shard)).count();
        let missing = |shard: &ShardId| match copies(shard) {
            // Nobody can copy what is nowhere.
            0 => 0,
            copies => self.replicas.min.saturating_sub(copies) as u64 * self.size(*shard),
        };
        self.healed.least = self.objects.keys().map(missing).sum();
        self.healed.lost = self.objects.keys().filter(|shard| copies(shard) == 0).count() as u64;
        self.healed.joint = self.nodes.iter().filter(|this| this.is_up()).map(|n| n.down).sum();
    }

    /// Notes whether anybody still counts on the dead.
    pub(crate) fn note_noticed(&mut self) {
        let is_models = self.options.scenario == Scenario::Models;
        if self.healed.noticed > 0 || self.healed.died == 0 || is_models {
            return;
        }
        let now = self.instant(self.now);
        let dead = || self.nodes.iter().filter(|this| this.is_gone).map(|this| this.id);
        let counted = self.nodes.iter().any(|this| {
            this.core.as_ref().is_some_and(|core| dead().any(|peer| core.counts_on(now, peer)))
        });
        if !counted {
            self.healed.noticed = self.now;
        }
    }

    /// A node is asked to leave for good.
    pub(crate) fn drain(&mut self, node: usize) {
        // A node that is down has no say, and swarms of three have nobody to spare.
        let stay = self.nodes.iter().filter(|this| !this.is_gone && this.leaves_since.is_none());
        if self.nodes[node].is_up() && !self.nodes[node].is_gone && stay.count() > 4 {
            self.nodes[node].leaves_since = Some(self.now);
        }
    }

    /// A node goes, and its disk with it.
    fn depart(&mut self, node: usize) {
        for shard in self.nodes[node].disk.whole().clone() {
            self.check_last_copy(node, shard);
            self.nodes[node].disk.evict(shard);
        }
        self.nodes[node].is_gone = true;
        self.stop(node, true);
    }
}
