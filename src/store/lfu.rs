//! Least frequently used, with decaying counts: a key's score is the sum of its
//! uses, each halved for every half-life that has passed since.
//!
//! This is LRFU (Lee and others, "LRFU: A Spectrum of Policies that Subsumes the
//! Least Recently Used and Least Frequently Used Policies", IEEE Transactions on
//! Computers 50, 2001). A scan adds one use to every key and so does not change
//! their order: it evicts the keys that it inserted, not those in regular use.
//! Scores of evicted keys are remembered in a bounded list, so a key that returns
//! is judged by its past.
//!
//! All scores decay at the same rate. So instead of lowering old scores, each new use
//! counts for more, and the order does not change. A use costs O(1): a key moves to its
//! place in the order, in O(log n), only when it next comes up as a victim.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::Bound::{Excluded, Unbounded};

use lru::LruCache;

use super::policy::Policy;

/// The half-life of a use, in uses of any key per key held.
const HALF_LIFE_USES_PER_KEY: f64 = 16.0;

/// Scores remembered of keys that are not held. The largest known model has 6,144 experts.
const REMEMBERED_MAX: usize = 16_384;

/// Scores are scaled down when [`Lfu::clock`] reaches this, before they overflow.
const CLOCK_MAX: f64 = 256.0;

/// Sorts keys worst first: by the bits of the score (scores are never negative, so
/// their bits sort like the numbers), then by the number of the last use.
type Rank = (u64, u64);

struct Held {
    cost: u64,
    rank: Rank,
    /// Its place in the order, which may lag behind `rank` but never exceeds it.
    placed: Cell<Rank>,
}

/// See the module's documentation. Admits everything.
pub struct Lfu<K: Hash + Eq> {
    held: HashMap<K, Held>,
    order: RefCell<BTreeMap<Rank, K>>,
    remembered: LruCache<K, f64>,
    /// The logarithm to base 2 of what a use is worth now.
    clock: f64,
    uses: u64,
    total: u64,
}

impl<K: Hash + Eq> Default for Lfu<K> {
    fn default() -> Self {
        Self {
            held: HashMap::new(),
            order: RefCell::default(),
            remembered: LruCache::unbounded(),
            clock: 0.0,
            uses: 0,
            total: 0,
        }
    }
}

impl<K: Hash + Eq + Clone> Lfu<K> {
    pub fn new() -> Self {
        Self::default()
    }

    /// The rank of a key with this score after one more use.
    fn rank_after_use(&mut self, score: f64) -> Rank {
        let rank = ((score + self.clock.exp2()).to_bits(), self.uses);
        self.uses += 1;
        rank
    }

    /// Advances the clock by one use. Scales all scores down before they overflow.
    fn tick(&mut self) {
        self.clock += 1.0 / (HALF_LIFE_USES_PER_KEY * self.held.len().max(1) as f64);
        if self.clock < CLOCK_MAX {
            return;
        }
        let scale = (-self.clock).exp2();
        self.clock = 0.0;
        let order = self.order.get_mut();
        order.clear();
        for (key, held) in &mut self.held {
            held.rank.0 = (f64::from_bits(held.rank.0) * scale).to_bits();
            held.placed.set(held.rank);
            order.insert(held.rank, key.clone());
        }
        for (_, score) in &mut self.remembered {
            *score *= scale;
        }
    }
}

impl<K: Hash + Eq + Clone + Send> Policy<K> for Lfu<K> {
    fn admit(&mut self, _: &K, _: u64) -> bool {
        true
    }

    fn insert(&mut self, key: K, cost: u64) {
        if let Some(held) = self.held.get_mut(&key) {
            self.total = self.total.saturating_sub(held.cost).saturating_add(cost);
            held.cost = cost;
            self.touch(&key);
            return;
        }
        self.tick();
        let score = self.remembered.pop(&key).unwrap_or(0.0);
        let rank = self.rank_after_use(score);
        self.order.get_mut().insert(rank, key.clone());
        self.held.insert(key, Held { cost, rank, placed: Cell::new(rank) });
        self.total = self.total.saturating_add(cost);
    }

    fn touch(&mut self, key: &K) -> bool {
        self.tick();
        let Some(before) = self.held.get(key).map(|held| held.rank) else { return false };
        let rank = self.rank_after_use(f64::from_bits(before.0));
        if let Some(held) = self.held.get_mut(key) {
            held.rank = rank;
        }
        true
    }

    fn remove(&mut self, key: &K) -> Option<u64> {
        let held = self.held.remove(key)?;
        self.total = self.total.saturating_sub(held.cost);
        if let Some(key) = self.order.get_mut().remove(&held.placed.get()) {
            if self.remembered.len() >= REMEMBERED_MAX {
                self.remembered.pop_lru();
            }
            self.remembered.put(key, f64::from_bits(held.rank.0));
        }
        Some(held.cost)
    }

    fn cost(&self, key: &K) -> Option<u64> {
        self.held.get(key).map(|held| held.cost)
    }

    fn total(&self) -> u64 {
        self.total
    }

    fn victims(&self, room: u64, spared: &dyn Fn(&K) -> bool) -> Option<Vec<K>> {
        let mut victims = Vec::new();
        let mut freed = 0_u64;
        let mut order = self.order.borrow_mut();
        let mut after = Unbounded;
        while freed < room {
            let (at, key) = order.range((after, Unbounded)).next()?;
            let (at, held) = (*at, self.held.get(key)?);
            if held.rank == at {
                if !spared(key) {
                    victims.push(key.clone());
                    freed = freed.saturating_add(held.cost);
                }
                after = Excluded(at);
            } else {
                // It was used since it was placed, so it belongs further back.
                held.placed.set(held.rank);
                let key = order.remove(&at)?;
                order.insert(held.rank, key);
            }
        }
        Some(victims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(keys: &[(u32, usize)]) -> Lfu<u32> {
        let mut lfu = Lfu::new();
        for (key, uses) in keys {
            lfu.insert(*key, 1);
            for _ in 1..*uses {
                assert!(lfu.touch(key));
            }
        }
        lfu
    }

    /// Inserts `key` as a full cache does, evicting the worst key, which it returns.
    fn insert_full(lfu: &mut Lfu<u32>, key: u32) -> u32 {
        let victim = lfu.victims(1, &|_| false).unwrap()[0];
        lfu.remove(&victim);
        lfu.insert(key, 1);
        victim
    }

    #[test]
    fn the_least_used_goes_first_and_among_equals_the_oldest() {
        let lfu = held(&[(1, 3), (2, 1), (3, 2)]);
        assert_eq!(lfu.victims(3, &|_| false), Some(vec![2, 3, 1]));
        assert_eq!(lfu.victims(1, &|key| *key == 2), Some(vec![3]));
        assert_eq!(lfu.victims(4, &|_| false), None);
        // Uses close to each other are worth almost the same, the later one a little more.
        let lfu = held(&[(5, 1), (4, 1), (6, 1)]);
        assert_eq!(lfu.victims(2, &|_| false), Some(vec![5, 4]));
    }

    #[test]
    fn a_scan_evicts_only_what_it_inserted() {
        let mut lfu = held(&[(1, 5), (2, 5), (3, 5), (4, 1)]);
        // Ten times what fits, but few half-lives: over many, all uses would fade.
        for key in 100..140 {
            insert_full(&mut lfu, key);
        }
        for key in [1, 2, 3] {
            assert!(lfu.touch(&key), "{key} was flushed");
        }
    }

    #[test]
    fn old_uses_fade() {
        let mut lfu = held(&[(1, 40), (2, 1)]);
        // Many half-lives, and beyond the point where scores are scaled down.
        for _ in 0..40_000 {
            assert!(lfu.touch(&2));
        }
        assert_eq!(lfu.victims(1, &|_| false), Some(vec![1]));
        assert!(lfu.clock < CLOCK_MAX && lfu.order.borrow().len() == 2);
    }

    #[test]
    fn a_key_that_comes_back_is_judged_by_its_past_and_the_past_is_bounded() {
        let mut lfu = held(&[(1, 5), (2, 2), (3, 6)]);
        lfu.remove(&1);
        assert_eq!(lfu.remove(&1), None);
        lfu.insert(1, 1);
        assert_eq!(lfu.victims(1, &|_| false), Some(vec![2]));
        for key in 10..10 + 2 * REMEMBERED_MAX as u32 {
            lfu.insert(key, 1);
            lfu.remove(&key);
        }
        assert_eq!(lfu.remembered.len(), REMEMBERED_MAX);
    }

    #[test]
    fn costs_add_up_through_insert_recost_and_remove() {
        let mut lfu = held(&[(1, 1), (2, 1)]);
        lfu.insert(2, 25);
        assert_eq!((lfu.total(), lfu.cost(&2), lfu.order.borrow().len()), (26, Some(25), 2));
        assert_eq!((lfu.remove(&2), lfu.total(), lfu.touch(&2)), (Some(25), 1, false));
        assert_eq!(lfu.victims(1, &|_| false), Some(vec![1]));
    }
}
