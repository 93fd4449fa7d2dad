//! Eviction policies: one trait for VRAM slots, RAM, disk and the trace replayer.
//!
//! A policy is pure: it holds keys and costs, but no bytes and no clock, and the
//! same calls always give the same victims. It does not evict by itself. The
//! owner asks for [`Policy::victims`], drops them, and then calls
//! [`Policy::remove`], so it can spare a victim that turns out to be in use.

use std::hash::Hash;

use lru::LruCache;

/// Keeps the order in which to evict keys. A cost is in the unit that the owner
/// budgets: bytes for RAM and disk, slots for VRAM.
pub trait Policy<K>: Send {
    /// Whether a key that is not held should be admitted at this cost. Call it
    /// before asking for victims. A scan-resistant policy may say no.
    fn admit(&mut self, key: &K, cost: u64) -> bool;

    /// Adds a key as the most recently used. A key that is held already gets the
    /// new cost.
    fn insert(&mut self, key: K, cost: u64);

    /// Records a use of a key. False if it is not held.
    fn touch(&mut self, key: &K) -> bool;

    /// Removes a key and returns its cost; `None` if it was not held.
    fn remove(&mut self, key: &K) -> Option<u64>;

    /// The cost of a key; `None` if it is not held.
    fn cost(&self, key: &K) -> Option<u64>;

    /// The sum of all costs.
    fn total(&self) -> u64;

    /// The first keys in the order of eviction whose costs add up to at least
    /// `room`, without those that `spared` says are pinned or in use. `None` if
    /// there are not enough; then evict nothing.
    fn victims(&self, room: u64, spared: &dyn Fn(&K) -> bool) -> Option<Vec<K>>;
}

/// Evicts the least recently used key first. Admits everything.
pub struct Lru<K: Hash + Eq> {
    /// Most recently used first; the value is the cost.
    order: LruCache<K, u64>,
    total: u64,
}

impl<K: Hash + Eq> Default for Lru<K> {
    fn default() -> Self {
        Self { order: LruCache::unbounded(), total: 0 }
    }
}

impl<K: Hash + Eq> Lru<K> {
    pub fn new() -> Self {
        Self::default()
    }
}

impl<K: Hash + Eq + Clone + Send> Policy<K> for Lru<K> {
    fn admit(&mut self, _: &K, _: u64) -> bool {
        true
    }

    fn insert(&mut self, key: K, cost: u64) {
        let before = self.order.put(key, cost).unwrap_or(0);
        self.total = self.total.saturating_sub(before).saturating_add(cost);
    }

    fn touch(&mut self, key: &K) -> bool {
        self.order.get(key).is_some()
    }

    fn remove(&mut self, key: &K) -> Option<u64> {
        let cost = self.order.pop(key)?;
        self.total = self.total.saturating_sub(cost);
        Some(cost)
    }

    fn cost(&self, key: &K) -> Option<u64> {
        self.order.peek(key).copied()
    }

    fn total(&self) -> u64 {
        self.total
    }

    fn victims(&self, room: u64, spared: &dyn Fn(&K) -> bool) -> Option<Vec<K>> {
        worst(self.order.iter().rev(), room, spared)
    }
}

/// [`Policy::victims`] of an iterator over keys and costs, worst first.
pub(super) fn worst<'a, K: Clone + 'a>(
    mut order: impl Iterator<Item = (&'a K, &'a u64)>,
    room: u64,
    spared: &dyn Fn(&K) -> bool,
) -> Option<Vec<K>> {
    let mut victims = Vec::new();
    let mut freed = 0_u64;
    while freed < room {
        let (key, cost) = order.next()?;
        if !spared(key) {
            victims.push(key.clone());
            freed = freed.saturating_add(*cost);
        }
    }
    Some(victims)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abc() -> Lru<char> {
        let mut lru = Lru::new();
        for key in ['a', 'b', 'c'] {
            lru.insert(key, 10);
        }
        lru
    }

    #[test]
    fn the_least_recently_used_goes_first_and_only_as_many_as_needed() {
        let mut lru = abc();
        assert!(lru.touch(&'a'));
        assert_eq!(lru.victims(0, &|_| false), Some(vec![]));
        assert_eq!(lru.victims(1, &|_| false), Some(vec!['b']));
        assert_eq!(lru.victims(11, &|_| false), Some(vec!['b', 'c']));
        assert_eq!(lru.victims(30, &|_| false), Some(vec!['b', 'c', 'a']));
        assert_eq!(lru.victims(31, &|_| false), None, "more than there is");
    }

    #[test]
    fn keys_in_use_are_spared() {
        let lru = abc();
        assert_eq!(lru.victims(10, &|key| *key == 'a'), Some(vec!['b']));
        assert_eq!(lru.victims(21, &|key| *key == 'a'), None);
        assert_eq!(lru.victims(1, &|_| true), None);
    }

    #[test]
    fn costs_add_up_through_insert_recost_and_remove() {
        let mut lru = abc();
        lru.insert('b', 25);
        assert_eq!((lru.total(), lru.cost(&'b')), (45, Some(25)));
        assert_eq!(lru.remove(&'b'), Some(25));
        assert_eq!(lru.remove(&'b'), None);
        assert!(!lru.touch(&'b'));
        assert_eq!(lru.total(), 20);
    }
}
