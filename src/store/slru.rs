//! Segmented LRU whose share follows what is held, for expert slots: keys that
//! were used once are evicted before keys that were used again, so a scan evicts
//! only what it inserted. `segmented` is the same policy with a fixed budget.
//!
//! Source: Karedla, Love and Wherry, "Caching Strategies to Improve Disk System
//! Performance", IEEE Computer 27, 1994.

use std::hash::Hash;

use lru::LruCache;

use super::policy::{Policy, worst};

/// The largest protected share of the total cost.
const PROTECTED_SHARE: f64 = 0.8;

/// See the module's documentation. Admits everything.
pub struct Slru<K: Hash + Eq> {
    /// Used once, or long ago. Most recently used first; the value is the cost.
    probation: LruCache<K, u64>,
    /// Used again.
    protected: LruCache<K, u64>,
    protected_total: u64,
    total: u64,
}

impl<K: Hash + Eq> Default for Slru<K> {
    fn default() -> Self {
        Self {
            probation: LruCache::unbounded(),
            protected: LruCache::unbounded(),
            protected_total: 0,
            total: 0,
        }
    }
}

impl<K: Hash + Eq> Slru<K> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves the least recently used protected keys back to probation, until the protected
    /// ones fit their share.
    fn demote(&mut self) {
        while self.protected_total as f64 > PROTECTED_SHARE * self.total as f64 {
            let Some((key, cost)) = self.protected.pop_lru() else { return };
            self.protected_total -= cost;
            self.probation.put(key, cost);
        }
    }
}

impl<K: Hash + Eq + Clone + Send> Policy<K> for Slru<K> {
    fn admit(&mut self, _: &K, _: u64) -> bool {
        true
    }

    fn insert(&mut self, key: K, cost: u64) {
        self.remove(&key);
        self.probation.put(key, cost);
        self.total = self.total.saturating_add(cost);
    }

    fn touch(&mut self, key: &K) -> bool {
        if self.protected.get(key).is_some() {
            return true;
        }
        let Some((key, cost)) = self.probation.pop_entry(key) else { return false };
        self.protected.put(key, cost);
        self.protected_total += cost;
        self.demote();
        true
    }

    fn remove(&mut self, key: &K) -> Option<u64> {
        let cost = match self.probation.pop(key) {
            Some(cost) => cost,
            None => {
                let cost = self.protected.pop(key)?;
                self.protected_total -= cost;
                cost
            }
        };
        self.total = self.total.saturating_sub(cost);
        Some(cost)
    }

    fn cost(&self, key: &K) -> Option<u64> {
        self.probation.peek(key).or_else(|| self.protected.peek(key)).copied()
    }

    fn total(&self) -> u64 {
        self.total
    }

    fn victims(&self, room: u64, spared: &dyn Fn(&K) -> bool) -> Option<Vec<K>> {
        worst(self.probation.iter().rev().chain(self.protected.iter().rev()), room, spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_leaves_keys_that_are_used_again() {
        let mut slru = Slru::new();
        for key in 0..10 {
            slru.insert(key, 1);
        }
        for key in 0..4 {
            assert!(slru.touch(&key));
        }
        for key in 100..200 {
            let victim = slru.victims(1, &|_| false).unwrap()[0];
            slru.remove(&victim);
            slru.insert(key, 1);
        }
        for key in 0..4 {
            assert!(slru.touch(&key), "{key} was flushed");
        }
        assert_eq!(slru.total(), 10);
    }

    #[test]
    fn protected_keys_stay_within_their_share_and_the_oldest_goes_back() {
        let mut slru = Slru::new();
        for key in 0..10 {
            slru.insert(key, 1);
        }
        for key in 0..10 {
            slru.touch(&key);
        }
        assert_eq!((slru.protected.len(), slru.protected_total), (8, 8));
        assert_eq!(slru.victims(3, &|_| false), Some(vec![0, 1, 2]));
        assert_eq!(slru.victims(1, &|key| *key < 2), Some(vec![2]));
        assert_eq!(slru.victims(11, &|_| false), None);
    }

    #[test]
    fn costs_add_up_through_insert_recost_and_remove() {
        let mut slru = Slru::new();
        slru.insert('a', 10);
        slru.insert('b', 10);
        slru.touch(&'b');
        slru.insert('b', 25);
        assert_eq!((slru.total(), slru.cost(&'b'), slru.protected_total), (35, Some(25), 0));
        assert_eq!((slru.remove(&'b'), slru.remove(&'b')), (Some(25), None));
        assert_eq!((slru.total(), slru.touch(&'b')), (10, false));
    }
}
