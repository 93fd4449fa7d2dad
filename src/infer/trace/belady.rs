//! Belady's optimum: evict what is used farthest in the future, or never again.
//!
//! L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
//! Journal 5, 1966. It needs the whole future, so it is for replays only. Where a layer asks for no
//! more experts than there are slots, no policy that obeys the engine's rules has fewer misses.
//! Where it asks for more, the order of waves matters, too, and this is a close bound, not a proven
//! one.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::Hash;

use doppler_store::policy::Policy;

/// Later than any use.
const NEVER: u64 = u64::MAX;

/// A policy that knows all uses in advance. All costs are 1.
pub struct Belady<K> {
    /// Future uses, soonest first.
    future: HashMap<K, VecDeque<u64>>,
    /// The next use of each held key.
    held: HashMap<K, u64>,
    /// The last entry is the worst.
    order: BTreeSet<(u64, K)>,
}

impl<K: Hash + Eq + Ord + Copy> Belady<K> {
    /// `uses` is every future use, in order.
    pub fn new(uses: impl Iterator<Item = K>) -> Self {
        let mut future: HashMap<K, VecDeque<u64>> = HashMap::new();
        for (at, key) in uses.enumerate() {
            future.entry(key).or_default().push_back(at as u64);
        }
        Self { future, held: HashMap::new(), order: BTreeSet::new() }
    }

    /// Drops the current use of `key` and returns the next one.
    fn next_use(&mut self, key: &K) -> u64 {
        let Some(uses) = self.future.get_mut(key) else { return NEVER };
        uses.pop_front();
        uses.front().copied().unwrap_or(NEVER)
    }
}

impl<K: Hash + Eq + Ord + Copy + Send> Policy<K> for Belady<K> {
    fn admit(&mut self, _: &K, _: u64) -> bool {
        true
    }

    fn insert(&mut self, key: K, _: u64) {
        let next = self.next_use(&key);
        if let Some(before) = self.held.insert(key, next) {
            self.order.remove(&(before, key));
        }
        self.order.insert((next, key));
    }

    fn touch(&mut self, key: &K) -> bool {
        let known = self.held.contains_key(key);
        if known {
            self.insert(*key, 1);
        }
        known
    }

    fn remove(&mut self, key: &K) -> Option<u64> {
        let next = self.held.remove(key)?;
        self.order.remove(&(next, *key));
        Some(1)
    }

    fn cost(&self, key: &K) -> Option<u64> {
        self.held.contains_key(key).then_some(1)
    }

    fn total(&self) -> u64 {
        self.held.len() as u64
    }

    fn victims(&self, room: u64, keep: &dyn Fn(&K) -> bool) -> Option<Vec<K>> {
        let free = self.order.iter().rev().map(|(_, key)| *key).filter(|key| !keep(key));
        let victims: Vec<K> = free.take(usize::try_from(room).ok()?).collect();
        (victims.len() as u64 == room).then_some(victims)
    }
}
