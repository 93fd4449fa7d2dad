//! What the disk tier keeps in memory about all of its objects: which ones it
//! has, what they count against the budget, and which to evict first. Does no
//! file I/O.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::copies::Guard;
use super::{Checkup, Object};
use crate::ShardId;
use crate::pins::Pins;
use crate::policy::{Lru, Policy};
use crate::verified::Outboard;

pub(super) struct Table {
    pub objects: HashMap<ShardId, Arc<Object>>,
    pub whole: BTreeSet<ShardId>,
    pub pins: Pins,
    /// Objects that are here because the swarm had too few copies.
    pub replicas: HashSet<ShardId>,
    pub guard: Guard,
    pub evicting: HashSet<ShardId>,
    pub policy: Box<dyn Policy<ShardId>>,
    /// Sum of the objects' charges and of the room reserved for writes in flight.
    pub used: u64,
    /// Objects used since the index was last written, with the number of the use.
    pub used_lately: HashMap<ShardId, u64>,
    /// Objects some part of which was read more than once.
    pub hot: HashSet<ShardId>,
    pub evictions: u64,
    pub quarantines: u64,
    pub damaged_bytes: u64,
    pub damage_at_open: Vec<Checkup>,
}

impl Table {
    pub fn new(policy: Box<dyn Policy<ShardId>>, guard: Guard) -> Self {
        Self {
            objects: HashMap::new(),
            whole: BTreeSet::new(),
            pins: Pins::default(),
            replicas: HashSet::new(),
            guard,
            evicting: HashSet::new(),
            policy,
            used: 0,
            used_lately: HashMap::new(),
            hot: HashSet::new(),
            evictions: 0,
            quarantines: 0,
            damaged_bytes: 0,
            damage_at_open: Vec::new(),
        }
    }

    pub fn pinned_bytes(&self) -> u64 {
        self.pins.iter().filter_map(|shard| self.policy.cost(&shard)).sum()
    }

    /// Sets how many bytes an object counts against the budget.
    pub fn charge(&mut self, shard: ShardId, bytes: u64) {
        let before = self.policy.cost(&shard).unwrap_or(0);
        self.used = self.used.saturating_sub(before) + bytes;
        self.policy.insert(shard, bytes);
    }

    /// Evictable objects, worst first, that together count at least `room` bytes.
    /// They are marked as being evicted, so that no other call returns them.
    /// `None` if there are not enough.
    pub fn take_victims(&mut self, room: u64, keep: Option<ShardId>) -> Option<Vec<ShardId>> {
        let spared = |shard: &ShardId| self.is_spared(*shard, keep);
        let victims = self.policy.victims(room, &spared)?;
        self.evicting.extend(victims.iter().copied());
        Some(victims)
    }

    /// As [`Self::take_victims`], but returns every evictable object if they are not enough.
    pub fn take_victims_up_to(&mut self, room: u64, keep: Option<ShardId>) -> Vec<ShardId> {
        let may_go = self.objects.keys().filter(|shard| !self.is_spared(**shard, keep));
        let all: u64 = may_go.filter_map(|shard| self.policy.cost(shard)).sum();
        self.take_victims(room.min(all), keep).unwrap_or_default()
    }

    /// As [`Self::take_victims_up_to`], with what is guarded.
    pub fn take_guarded_victims_up_to(&mut self, room: u64) -> Vec<ShardId> {
        let spared = |shard: &ShardId| self.is_in_use(*shard, None);
        let may_go = self.objects.keys().filter(|shard| !spared(shard));
        let all: u64 = may_go.filter_map(|shard| self.policy.cost(shard)).sum();
        let victims = self.policy.victims(room.min(all), &spared).unwrap_or_default();
        self.evicting.extend(victims.iter().copied());
        victims
    }

    fn is_spared(&self, shard: ShardId, keep: Option<ShardId>) -> bool {
        self.is_in_use(shard, keep) || self.guard.spares(shard)
    }

    fn is_in_use(&self, shard: ShardId, keep: Option<ShardId>) -> bool {
        Some(shard) == keep || self.pins.spare(shard) || self.evicting.contains(&shard)
    }

    /// Bytes that are kept only because too few others hold them.
    pub fn guarded_bytes(&self) -> u64 {
        let kept = |shard: &&ShardId| self.guard.spares(**shard) && !self.pins.contains(**shard);
        self.objects.keys().filter(kept).filter_map(|shard| self.policy.cost(shard)).sum()
    }

    /// Bytes of the objects that may be evicted.
    pub fn evictable_bytes(&self) -> u64 {
        let may_go = self.objects.keys().filter(|shard| !self.is_spared(**shard, None));
        may_go.filter_map(|shard| self.policy.cost(shard)).sum()
    }

    /// Forgets an object, but not who pins it. True if it was whole.
    pub fn forget(&mut self, shard: ShardId) -> bool {
        self.objects.remove(&shard);
        self.replicas.remove(&shard);
        self.hot.remove(&shard);
        self.used_lately.remove(&shard);
        self.used = self.used.saturating_sub(self.policy.remove(&shard).unwrap_or(0));
        self.whole.remove(&shard)
    }
}

/// A cache of whole objects' outboards, so that reads do not load them each time.
#[derive(Default)]
pub(super) struct Outboards {
    pub nodes: HashMap<ShardId, Outboard>,
    pub order: Lru<ShardId>,
}
