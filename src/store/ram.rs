//! The RAM tier: verified byte ranges of objects, within a byte budget.
//!
//! A read within a held range is a hit. A range larger than the budget is not
//! admitted, although its reader still gets the bytes. Ranges may be pinned, up to
//! the budget. Invariants: the bytes held, plus those reserved for objects kept
//! elsewhere in memory, never exceed the budget; a pinned range is never evicted.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use super::policy::Policy;
use super::segmented::Segmented;
use super::{ByteRange, ShardId};

/// How many ranges that start at or before a read are searched for one that covers it.
const OVERLAP_LOOKUPS_MAX: usize = 16;

type Key = (ShardId, ByteRange);

/// A byte-budgeted cache of (shard, range) -> bytes.
pub struct RamTier {
    budget: u64,
    reserved: u64,
    /// Ranges by start, with end and bytes; at most one range per start.
    shards: HashMap<ShardId, BTreeMap<u64, (u64, Bytes)>>,
    policy: Box<dyn Policy<Key>>,
    /// Pinned ranges, and how often each is pinned.
    pinned: HashMap<Key, u32>,
    evictions: u64,
}

impl RamTier {
    /// A tier with a budget in bytes that evicts by segmented LRU ([`Segmented`]).
    pub fn new(budget: u64) -> Self {
        Self::with_policy(budget, Box::new(Segmented::new(budget)))
    }

    pub fn with_policy(budget: u64, policy: Box<dyn Policy<(ShardId, ByteRange)>>) -> Self {
        let (shards, pinned) = (HashMap::new(), HashMap::new());
        Self { budget, reserved: 0, shards, policy, pinned, evictions: 0 }
    }

    /// The bytes of `range`; `None` if no held range contains it.
    pub fn get(&mut self, shard: ShardId, range: ByteRange) -> Option<Bytes> {
        let (held, bytes) = find(self.shards.get(&shard)?, range)?;
        self.policy.touch(&(shard, held));
        let from = (range.start() - held.start()) as usize;
        Some(bytes.slice(from..from + range.len() as usize))
    }

    /// Stores the bytes of `range`. False if they were not admitted.
    pub fn insert(&mut self, shard: ShardId, range: ByteRange, bytes: Bytes) -> bool {
        let cost = range.len();
        if bytes.len() as u64 != cost || cost > self.budget.saturating_sub(self.reserved) {
            return false;
        }
        if let Some((held, _)) = self.shards.get(&shard).and_then(|ranges| find(ranges, range)) {
            return self.policy.touch(&(shard, held));
        }
        if !self.policy.admit(&(shard, range), cost) {
            return false;
        }
        self.place(shard, range, bytes)
    }

    fn place(&mut self, shard: ShardId, range: ByteRange, bytes: Bytes) -> bool {
        // Only one range per start can be held, and a pinned one is not replaced.
        let starts_pinned = self.shards.get(&shard).and_then(|ranges| {
            let (end, _) = ranges.get(&range.start())?;
            Some(self.pinned.contains_key(&(shard, ByteRange::new(range.start(), *end)?)))
        });
        if starts_pinned == Some(true) {
            return false;
        }
        self.drop_within(shard, range);
        if !self.make_room(range.len()) {
            return false;
        }
        let end = range.end();
        self.shards.entry(shard).or_default().insert(range.start(), (end, bytes));
        self.policy.insert((shard, range), range.len());
        true
    }

    /// Holds the bytes of `range` until they are unpinned as often as they were
    /// pinned. The error is how many bytes could still be pinned.
    pub fn pin(&mut self, shard: ShardId, range: ByteRange, bytes: Bytes) -> Result<(), u64> {
        let key = match self.shards.get(&shard).and_then(|ranges| find(ranges, range)) {
            Some((held, _)) => (shard, held),
            None => (shard, range),
        };
        let pinned: u64 = self.pinned.keys().map(|(_, range)| range.len()).sum();
        let available = self.budget.saturating_sub(self.reserved).saturating_sub(pinned);
        if !self.pinned.contains_key(&key) && key.1.len() > available
            || bytes.len() as u64 != range.len()
        {
            return Err(available);
        }
        if self.policy.cost(&key).is_none() && !self.place(shard, range, bytes) {
            return Err(available);
        }
        *self.pinned.entry(key).or_insert(0) += 1;
        Ok(())
    }

    /// Undoes one pin of a range that contains this one. False if there is none.
    pub fn unpin(&mut self, shard: ShardId, range: ByteRange) -> bool {
        let covers = |(of, held): &&Key| *of == shard && held.contains(&range);
        let Some(key) = self.pinned.keys().find(covers).copied() else { return false };
        if let Some(count) = self.pinned.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.pinned.remove(&key);
            }
        }
        true
    }

    /// Drops every range of an object, pinned or not.
    pub fn forget(&mut self, shard: ShardId) {
        self.pinned.retain(|(of, _), _| *of != shard);
        for (start, (end, _)) in self.shards.remove(&shard).unwrap_or_default() {
            if let Some(range) = ByteRange::new(start, end) {
                self.policy.remove(&(shard, range));
            }
        }
    }

    /// Reserves `bytes` of the budget for objects held elsewhere in memory, and
    /// evicts as needed. The error is how many bytes are available.
    pub fn reserve(&mut self, bytes: u64) -> Result<(), u64> {
        let pinned: u64 = self.pinned.keys().map(|(_, range)| range.len()).sum();
        let available = self.budget.saturating_sub(self.reserved).saturating_sub(pinned);
        if bytes > available {
            return Err(available);
        }
        self.make_room(bytes);
        self.reserved += bytes;
        Ok(())
    }

    /// Bytes held, not counting those reserved.
    pub fn used(&self) -> u64 {
        self.policy.total()
    }

    pub const fn budget(&self) -> u64 {
        self.budget
    }

    /// Ranges evicted to make room since the start.
    pub const fn evictions(&self) -> u64 {
        self.evictions
    }

    fn make_room(&mut self, cost: u64) -> bool {
        let limit = self.budget.saturating_sub(self.reserved).saturating_sub(cost);
        let over = self.policy.total().saturating_sub(limit);
        let Some(victims) = self.policy.victims(over, &|key| self.pinned.contains_key(key)) else {
            return false;
        };
        for key in victims {
            self.drop_key(key);
            self.evictions += 1;
        }
        true
    }

    /// Drops the unpinned ranges that lie within `range`, which replaces them.
    fn drop_within(&mut self, shard: ShardId, range: ByteRange) {
        let Some(ranges) = self.shards.get(&shard) else { return };
        let within: Vec<Key> = ranges
            .range(range.start()..range.end())
            .filter(|(_, (end, _))| *end <= range.end())
            .filter_map(|(start, (end, _))| Some((shard, ByteRange::new(*start, *end)?)))
            .filter(|key| !self.pinned.contains_key(key))
            .collect();
        for key in within {
            self.drop_key(key);
        }
    }

    fn drop_key(&mut self, key: Key) {
        self.policy.remove(&key);
        if let Some(ranges) = self.shards.get_mut(&key.0) {
            ranges.remove(&key.1.start());
            if ranges.is_empty() {
                self.shards.remove(&key.0);
            }
        }
    }
}

/// A held range that contains `range`.
fn find(ranges: &BTreeMap<u64, (u64, Bytes)>, range: ByteRange) -> Option<(ByteRange, &Bytes)> {
    ranges
        .range(..=range.start())
        .rev()
        .take(OVERLAP_LOOKUPS_MAX)
        .find(|(_, (end, _))| *end >= range.end())
        .and_then(|(start, (end, bytes))| Some((ByteRange::new(*start, *end)?, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ShardId {
        ShardId::of(&[n])
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn bytes(range: ByteRange) -> Bytes {
        (range.start()..range.end()).map(|i| i as u8).collect()
    }

    fn put(ram: &mut RamTier, shard: ShardId, at: ByteRange) -> bool {
        ram.insert(shard, at, bytes(at))
    }

    #[test]
    fn the_budget_holds_and_the_least_used_goes() {
        let mut ram = RamTier::new(100);
        for n in 0..4 {
            assert!(put(&mut ram, id(n), range(0, 25)));
        }
        assert!(ram.get(id(0), range(0, 25)).is_some());
        assert!(put(&mut ram, id(9), range(0, 30)));
        assert!(ram.used() <= 100, "{}", ram.used());
        assert_eq!(ram.evictions(), 2);
        assert!(ram.get(id(1), range(0, 25)).is_none() && ram.get(id(2), range(0, 25)).is_none());
        assert!(ram.get(id(0), range(0, 25)).is_some() && ram.get(id(3), range(0, 25)).is_some());
    }

    #[test]
    fn what_cannot_fit_is_not_admitted_and_evicts_nothing() {
        let mut ram = RamTier::new(100);
        assert!(put(&mut ram, id(1), range(0, 90)));
        assert!(!put(&mut ram, id(2), range(0, 101)));
        assert_eq!(ram.evictions(), 0);
        assert!(ram.get(id(1), range(0, 90)).is_some());
        assert!(!ram.insert(id(3), range(0, 10), Bytes::from_static(b"short")), "wrong length");
        assert!(!put(&mut RamTier::new(0), id(1), range(0, 1)));
    }

    #[test]
    fn a_range_within_a_held_one_is_a_hit_and_a_larger_one_replaces() {
        let mut ram = RamTier::new(100);
        assert!(put(&mut ram, id(1), range(10, 20)));
        assert!(put(&mut ram, id(1), range(30, 40)));
        assert_eq!(ram.get(id(1), range(12, 15)).unwrap(), bytes(range(12, 15)));
        assert!(ram.get(id(1), range(15, 35)).is_none(), "a gap");
        assert!(put(&mut ram, id(1), range(5, 45)));
        assert_eq!(ram.used(), 40, "the parts went with the whole");
        assert_eq!(ram.get(id(1), range(10, 40)).unwrap(), bytes(range(10, 40)));
        assert!(put(&mut ram, id(1), range(6, 7)), "covered already");
        assert_eq!((ram.used(), ram.evictions()), (40, 0));
    }

    #[test]
    fn what_is_pinned_stays_within_the_budget() {
        let mut ram = RamTier::new(100);
        let pin = |ram: &mut RamTier, n, at| ram.pin(id(n), at, bytes(at));
        assert!(put(&mut ram, id(1), range(0, 50)));
        assert_eq!(pin(&mut ram, 1, range(10, 20)), Ok(()), "within what is held");
        assert_eq!(pin(&mut ram, 1, range(0, 50)), Ok(()), "twice");
        assert_eq!(pin(&mut ram, 2, range(0, 51)), Err(50));
        assert_eq!(pin(&mut ram, 2, range(0, 30)), Ok(()));
        assert_eq!(ram.reserve(21), Err(20));
        for n in 10..20 {
            assert!(put(&mut ram, id(n), range(0, 20)));
            assert!(!put(&mut ram, id(n), range(0, 21)), "only what is not pinned can make room");
        }
        assert!(!put(&mut ram, id(2), range(0, 31)), "a pinned range is not replaced");
        assert!(ram.get(id(1), range(0, 50)).is_some() && ram.get(id(2), range(0, 30)).is_some());
        assert!(ram.unpin(id(1), range(0, 50)) && put(&mut ram, id(3), range(0, 20)));
        assert!(ram.get(id(1), range(0, 50)).is_some(), "pinned once more");
        assert!(ram.unpin(id(1), range(0, 50)) && !ram.unpin(id(1), range(0, 50)));
        assert!(put(&mut ram, id(4), range(0, 70)));
        assert!(ram.get(id(1), range(0, 50)).is_none());
        ram.forget(id(2));
        assert!(ram.get(id(2), range(0, 30)).is_none() && !ram.unpin(id(2), range(0, 30)));
        assert!(put(&mut ram, id(5), range(0, 100)) && ram.used() == 100);
    }

    #[test]
    fn one_pass_does_not_flush_what_was_read_again() {
        let mut ram = RamTier::new(100);
        for n in 0..3 {
            assert!(put(&mut ram, id(n), range(0, 25)));
            assert!(ram.get(id(n), range(5, 9)).is_some());
        }
        for n in 10..200 {
            assert!(put(&mut ram, id(n), range(0, 25)));
        }
        assert!((0..3).all(|n| ram.get(id(n), range(0, 25)).is_some()));
    }

    #[test]
    fn reserved_bytes_leave_less_for_the_cache() {
        let mut ram = RamTier::new(100);
        assert!(put(&mut ram, id(1), range(0, 80)));
        assert_eq!(ram.reserve(50), Ok(()));
        assert!(ram.get(id(1), range(0, 80)).is_none());
        assert!(!put(&mut ram, id(1), range(0, 51)) && put(&mut ram, id(1), range(0, 50)));
        assert_eq!(ram.reserve(51), Err(50));
    }
}
