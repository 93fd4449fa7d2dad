//! What the disk tier knows in memory of all its objects: which there are, what
//! they count against the budget, and who may go first. No file is touched here.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::{Checkup, Object};
use crate::ShardId;
use crate::policy::{Lru, Policy};
use crate::verified::Outboard;

pub(super) struct Table {
    pub objects: HashMap<ShardId, Arc<Object>>,
    pub whole: BTreeSet<ShardId>,
    pub pinned: HashSet<ShardId>,
    pub evicting: HashSet<ShardId>,
    pub policy: Box<dyn Policy<ShardId>>,
    /// Sum of the objects' charges and of room promised to writes under way.
    pub used: u64,
    /// Objects used since the index was last told, with the use's number.
    pub used_lately: HashMap<ShardId, u64>,
    /// Objects of which something was read again.
    pub hot: HashSet<ShardId>,
    pub evictions: u64,
    pub quarantines: u64,
    pub damaged_bytes: u64,
    pub damage_at_open: Vec<Checkup>,
}

impl Table {
    pub fn new(policy: Box<dyn Policy<ShardId>>) -> Self {
        Self {
            objects: HashMap::new(),
            whole: BTreeSet::new(),
            pinned: HashSet::new(),
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
        self.pinned.iter().filter_map(|shard| self.policy.cost(shard)).sum()
    }

    /// Sets what an object counts against the budget.
    pub fn charge(&mut self, shard: ShardId, bytes: u64) {
        let before = self.policy.cost(&shard).unwrap_or(0);
        self.used = self.used.saturating_sub(before) + bytes;
        self.policy.insert(shard, bytes);
    }

    /// Objects that may go, worst first, that count at least `room` together,
    /// marked so that nobody else takes them too. `None` if there are not enough.
    pub fn take_victims(&mut self, room: u64, keep: Option<ShardId>) -> Option<Vec<ShardId>> {
        let spared = |shard: &ShardId| self.is_spared(*shard, keep);
        let victims = self.policy.victims(room, &spared)?;
        self.evicting.extend(victims.iter().copied());
        Some(victims)
    }

    /// The same; all that may go where that is not enough.
    pub fn take_victims_up_to(&mut self, room: u64, keep: Option<ShardId>) -> Vec<ShardId> {
        let may_go = self.objects.keys().filter(|shard| !self.is_spared(**shard, keep));
        let all: u64 = may_go.filter_map(|shard| self.policy.cost(shard)).sum();
        self.take_victims(room.min(all), keep).unwrap_or_default()
    }

    fn is_spared(&self, shard: ShardId, keep: Option<ShardId>) -> bool {
        Some(shard) == keep || self.pinned.contains(&shard) || self.evicting.contains(&shard)
    }

    pub fn forget(&mut self, shard: ShardId) -> bool {
        self.objects.remove(&shard);
        self.pinned.remove(&shard);
        self.hot.remove(&shard);
        self.used_lately.remove(&shard);
        self.used = self.used.saturating_sub(self.policy.remove(&shard).unwrap_or(0));
        self.whole.remove(&shard)
    }
}

/// Outboards of whole objects, kept so that a read need not read them again.
#[derive(Default)]
pub(super) struct Outboards {
    pub nodes: HashMap<ShardId, Outboard>,
    pub order: Lru<ShardId>,
}
