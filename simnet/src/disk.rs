//! A node's disk: which objects and groups it holds, what is pinned, what is damaged. Bytes are
//! not there; groups are. What is evicted is chosen by the store's policy.
//!
//! Invariant: what it says that it holds was durable, and was not found damaged.

use std::collections::{BTreeMap, BTreeSet};

use doppler_ids::{ByteRange, ShardId};
use doppler_store::groups::{Chunks, Groups};
use doppler_store::policy::Policy;
use doppler_store::verified::GROUP_BYTES;

use crate::node::Purpose;

/// A write that is not durable yet; a crash forgets it.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub shard: ShardId,
    pub size: u64,
    pub range: ByteRange,
    pub is_pinned: bool,
    pub purpose: Purpose,
}

/// What a read of the disk finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Held,
    Missing,
    /// A group does not match its hash; it is not held any more.
    Damaged,
}

pub struct Disk {
    whole: BTreeSet<ShardId>,
    parts: BTreeMap<ShardId, Groups>,
    sizes: BTreeMap<ShardId, u64>,
    /// Groups that have changed without anybody knowing.
    flipped: BTreeMap<ShardId, u64>,
    pins: BTreeSet<ShardId>,
    /// Held because the swarm needs copies; not evicted for anything else.
    replicas: BTreeSet<ShardId>,
    policy: Box<dyn Policy<ShardId>>,
    budget: u64,
    pub is_full: bool,
    pub jobs: BTreeMap<u64, Job>,
}

impl Disk {
    pub fn new(budget: u64, policy: Box<dyn Policy<ShardId>>) -> Self {
        Self {
            whole: BTreeSet::new(),
            parts: BTreeMap::new(),
            sizes: BTreeMap::new(),
            flipped: BTreeMap::new(),
            pins: BTreeSet::new(),
            replicas: BTreeSet::new(),
            policy,
            budget,
            is_full: false,
            jobs: BTreeMap::new(),
        }
    }

    pub const fn whole(&self) -> &BTreeSet<ShardId> {
        &self.whole
    }

    pub fn is_whole(&self, shard: ShardId) -> bool {
        self.whole.contains(&shard)
    }

    /// Whole, and no bit of it has flipped.
    pub fn is_sound(&self, shard: ShardId) -> bool {
        self.is_whole(shard) && !self.flipped.contains_key(&shard)
    }

    pub fn is_pinned(&self, shard: ShardId) -> bool {
        self.pins.contains(&shard)
    }

    /// Whole, and only here because the swarm needs copies.
    pub fn is_replica(&self, shard: ShardId) -> bool {
        self.is_whole(shard) && self.replicas.contains(&shard) && !self.is_pinned(shard)
    }

    /// What is held in part, as it is announced.
    pub fn chunks(&self) -> BTreeMap<ShardId, Chunks> {
        let parts = self.parts.iter().map(|(shard, groups)| (*shard, groups.chunks()));
        parts.filter(|(_, chunks)| !chunks.is_none()).collect()
    }

    pub fn holds(&self, shard: ShardId, range: ByteRange) -> bool {
        self.is_whole(shard) || self.parts.get(&shard).is_some_and(|groups| groups.holds(range))
    }

    pub fn held_bytes(&self, shard: ShardId) -> u64 {
        if self.is_whole(shard) {
            return self.sizes.get(&shard).copied().unwrap_or(0);
        }
        self.parts.get(&shard).map_or(0, Groups::held_bytes)
    }

    /// Bytes held.
    pub fn used(&self) -> u64 {
        self.policy.total() + self.parts.values().map(Groups::held_bytes).sum::<u64>()
    }

    pub const fn budget(&self) -> u64 {
        self.budget
    }

    /// Reads a range to serve it; its groups are checked.
    pub fn look(&mut self, shard: ShardId, range: ByteRange) -> Look {
        if !self.holds(shard, range) {
            return Look::Missing;
        }
        let Some(group) = self.flipped.get(&shard).copied() else {
            self.policy.touch(&shard);
            return Look::Held;
        };
        let start = group * GROUP_BYTES;
        if start >= range.end() || start + GROUP_BYTES <= range.start() {
            return Look::Held;
        }
        self.flipped.remove(&shard);
        let Some(size) = self.sizes.get(&shard).copied() else { return Look::Missing };
        let mut groups = Groups::none(size);
        let before = ByteRange::new(0, start);
        let after = ByteRange::new((start + GROUP_BYTES).min(size), size);
        for good in before.into_iter().chain(after) {
            groups.set(good);
        }
        self.whole.remove(&shard);
        self.policy.remove(&shard);
        self.parts.insert(shard, groups);
        Look::Damaged
    }

    /// A bit of an object flips; of which one, `pick` says. `None` if nothing is held.
    pub fn flip(&mut self, pick: u64, may: impl Fn(ShardId) -> bool) -> Option<ShardId> {
        let all: Vec<ShardId> = self.whole.iter().copied().filter(|shard| may(*shard)).collect();
        let shard = *all.get(usize::try_from(pick % all.len().max(1) as u64).unwrap_or(0))?;
        let groups = self.sizes.get(&shard).copied().unwrap_or(1).div_ceil(GROUP_BYTES);
        self.flipped.insert(shard, (pick >> 32) % groups.max(1));
        Some(shard)
    }

    /// What must go so that so many bytes more fit; `None` if that cannot be.
    pub fn victims(&self, bytes: u64, spared: &dyn Fn(ShardId) -> bool) -> Option<Vec<ShardId>> {
        let over = (self.used() + bytes).saturating_sub(self.budget);
        let kept = |shard: &ShardId| self.pins.contains(shard) || self.replicas.contains(shard);
        self.policy.victims(over, &|shard| kept(shard) || spared(*shard))
    }

    pub fn evict(&mut self, shard: ShardId) {
        self.whole.remove(&shard);
        self.parts.remove(&shard);
        self.flipped.remove(&shard);
        self.pins.remove(&shard);
        self.replicas.remove(&shard);
        self.policy.remove(&shard);
    }

    /// A write has become durable. True if the object is whole now and was not before.
    pub fn put(&mut self, job: Job) -> bool {
        if job.is_pinned {
            self.pins.insert(job.shard);
        }
        if job.purpose == Purpose::Heal {
            self.replicas.insert(job.shard);
        }
        if self.is_whole(job.shard) {
            return false;
        }
        self.sizes.insert(job.shard, job.size);
        let groups = self.parts.entry(job.shard).or_insert_with(|| Groups::none(job.size));
        groups.set(job.range);
        if !groups.is_whole() {
            return false;
        }
        self.parts.remove(&job.shard);
        self.whole.insert(job.shard);
        self.policy.insert(job.shard, job.size);
        true
    }

    /// The process is gone, and with it what was not durable.
    pub fn crash(&mut self) {
        self.jobs.clear();
    }
}

#[cfg(test)]
mod tests {
    use doppler_store::PolicyKind;

    use super::*;

    #[test]
    fn parts_become_whole_and_damage_is_found_when_it_is_read() {
        let mut disk = Disk::new(10 * GROUP_BYTES, PolicyKind::Lru.make());
        let (shard, size) = (ShardId::of(b"s"), 3 * GROUP_BYTES + 5);
        let at = |start, end| ByteRange::new(start, end).unwrap();
        let job = |range| Job { shard, size, range, is_pinned: false, purpose: Purpose::Work };
        assert!(!disk.put(job(at(0, GROUP_BYTES))));
        assert!(!disk.holds(shard, at(0, size)) && disk.holds(shard, at(0, 9)));
        assert!(disk.put(job(at(GROUP_BYTES, size))));
        assert_eq!((disk.used(), disk.held_bytes(shard)), (size, size));
        assert_eq!(disk.flip(1 << 32, |_| true), Some(shard), "its second group");
        assert!(!disk.is_sound(shard));
        assert_eq!(disk.look(shard, at(0, GROUP_BYTES)), Look::Held);
        assert_eq!(disk.look(shard, at(0, size)), Look::Damaged);
        assert_eq!(disk.look(shard, at(0, size)), Look::Missing);
        assert_eq!(disk.held_bytes(shard), size - GROUP_BYTES);
        assert!(disk.put(job(at(GROUP_BYTES, 2 * GROUP_BYTES))));
        assert_eq!(disk.victims(7 * GROUP_BYTES, &|_| false), Some(vec![shard]));
        let pin = Job { is_pinned: true, ..job(at(0, 1)) };
        assert!(!disk.put(pin), "it was whole");
        assert_eq!(disk.victims(7 * GROUP_BYTES, &|_| false), None);
        disk.evict(shard);
        assert_eq!(disk.used(), 0);
    }
}
