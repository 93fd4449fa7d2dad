//! Segmented LRU with a fixed budget, for RAM and disk: a policy that a scan
//! cannot flush.
//!
//! New keys enter the first segment, which is evicted first. A key that is used
//! again moves to the second. So a scan over more than fits evicts only keys that
//! were used once (Karedla, Love and Wherry, "Caching strategies to improve disk
//! system performance", IEEE Computer 27(3), 1994). Invariant: the second segment
//! holds at most `HOT_FIFTHS` fifths of the budget, so there is always room for
//! new keys. `slru` is the same policy without a budget of its own.

use std::hash::Hash;

use lru::LruCache;

use super::policy::{Policy, worst};

/// The share of the budget, in fifths, that the second segment may hold.
const HOT_FIFTHS: u64 = 4;

/// Evicts keys that were used once before keys that were used again, and in each of the two
/// segments the least recently used key first. Admits everything.
pub struct Segmented<K: Hash + Eq> {
    once: Segment<K>,
    again: Segment<K>,
    again_max: u64,
}

/// Keys with their costs, most recently used first.
struct Segment<K: Hash + Eq> {
    order: LruCache<K, u64>,
    total: u64,
}

impl<K: Hash + Eq> Segment<K> {
    fn new() -> Self {
        Self { order: LruCache::unbounded(), total: 0 }
    }

    fn put(&mut self, key: K, cost: u64) {
        let before = self.order.put(key, cost).unwrap_or(0);
        self.total = self.total.saturating_sub(before).saturating_add(cost);
    }

    fn pop(&mut self, key: &K) -> Option<u64> {
        let cost = self.order.pop(key)?;
        self.total = self.total.saturating_sub(cost);
        Some(cost)
    }

    fn pop_oldest(&mut self) -> Option<(K, u64)> {
        let (key, cost) = self.order.pop_lru()?;
        self.total = self.total.saturating_sub(cost);
        Some((key, cost))
    }
}

impl<K: Hash + Eq> Segmented<K> {
    /// `budget` is the owner's limit on the sum of the costs.
    pub fn new(budget: u64) -> Self {
        Self { once: Segment::new(), again: Segment::new(), again_max: budget / 5 * HOT_FIFTHS }
    }

    /// Whether the key is held and was used again after its insertion.
    pub fn is_hot(&self, key: &K) -> bool {
        self.again.order.contains(key)
    }

    /// Moves the least recently used keys of the second segment back to the first, until the
    /// second fits its share.
    fn keep_within_share(&mut self) {
        while self.again.total > self.again_max
            && self.again.order.len() > 1
            && let Some((key, cost)) = self.again.pop_oldest()
        {
            self.once.put(key, cost);
        }
    }
}

impl<K: Hash + Eq + Clone + Send> Policy<K> for Segmented<K> {
    fn admit(&mut self, _: &K, _: u64) -> bool {
        true
    }

    fn insert(&mut self, key: K, cost: u64) {
        if self.is_hot(&key) {
            self.again.put(key, cost);
            self.keep_within_share();
        } else {
            self.once.put(key, cost);
        }
    }

    fn touch(&mut self, key: &K) -> bool {
        if self.again.order.get(key).is_some() {
            return true;
        }
        let Some((key, cost)) = self.once.order.pop_entry(key) else { return false };
        self.once.total = self.once.total.saturating_sub(cost);
        self.again.put(key, cost);
        self.keep_within_share();
        true
    }

    fn remove(&mut self, key: &K) -> Option<u64> {
        self.once.pop(key).or_else(|| self.again.pop(key))
    }

    fn cost(&self, key: &K) -> Option<u64> {
        self.once.order.peek(key).or_else(|| self.again.order.peek(key)).copied()
    }

    fn total(&self) -> u64 {
        self.once.total.saturating_add(self.again.total)
    }

    fn victims(&self, room: u64, spared: &dyn Fn(&K) -> bool) -> Option<Vec<K>> {
        worst(self.once.order.iter().rev().chain(self.again.order.iter().rev()), room, spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inserts as an owner with a budget does: evicts what the policy names.
    fn admit(policy: &mut Segmented<u32>, budget: u64, key: u32, cost: u64) {
        let over = (policy.total() + cost).saturating_sub(budget);
        for victim in policy.victims(over, &|_| false).unwrap() {
            policy.remove(&victim);
        }
        policy.insert(key, cost);
        assert!(policy.total() <= budget);
    }

    #[test]
    fn a_scan_over_more_than_fits_leaves_hot_keys() {
        let budget = 100;
        let mut policy = Segmented::new(budget);
        for key in 0..8 {
            admit(&mut policy, budget, key, 10);
            assert!(policy.touch(&key));
        }
        for key in 100..1000 {
            admit(&mut policy, budget, key, 10);
        }
        assert!((0..8).all(|key| policy.cost(&key) == Some(10)), "all hot keys are still held");
        // A new working set takes their place once it is used again.
        for _ in 0..3 {
            for key in 2000..2002 {
                if !policy.touch(&key) {
                    admit(&mut policy, budget, key, 10);
                }
            }
        }
        assert!(policy.is_hot(&2000) && policy.is_hot(&2001));
        assert!(!policy.is_hot(&0) && !policy.is_hot(&1), "at most four fifths are hot");
        assert_eq!(policy.cost(&0), Some(10), "still held, but evicted next");
    }

    #[test]
    fn inserting_again_refreshes_but_does_not_make_hot() {
        let mut policy = Segmented::new(100);
        for key in ['a', 'b', 'c'] {
            policy.insert(key, 10);
        }
        policy.insert('a', 12);
        assert!(!policy.is_hot(&'a'));
        assert_eq!(policy.victims(11, &|_| false), Some(vec!['b', 'c']));
        assert!(policy.touch(&'b'));
        policy.insert('b', 20);
        assert!(policy.is_hot(&'b'));
        assert_eq!((policy.total(), policy.cost(&'b')), (42, Some(20)));
        assert_eq!(policy.victims(42, &|_| false), Some(vec!['c', 'a', 'b']));
        assert_eq!(policy.victims(43, &|_| false), None);
        assert_eq!(policy.victims(12, &|key| *key == 'c'), Some(vec!['a']));
        assert_eq!([policy.remove(&'b'), policy.remove(&'b')], [Some(20), None]);
        assert!(!policy.touch(&'b'));
        assert_eq!(policy.total(), 22);
    }
}
