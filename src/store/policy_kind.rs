//! The eviction policies by name.

use std::fmt;
use std::hash::Hash;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::lfu::Lfu;
use super::policy::{Lru, Policy};
use super::slru::Slru;

/// A policy that can be chosen by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// Least recently used.
    Lru,
    /// Least frequently used, with decaying counts. The best for experts in our measurements.
    #[default]
    Lfu,
    /// Segmented least recently used.
    Slru,
}

/// A name that is not a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown policy {0:?} (known: lru, lfu, slru)")]
pub struct UnknownPolicy(pub String);

impl PolicyKind {
    pub const ALL: [Self; 3] = [Self::Lru, Self::Lfu, Self::Slru];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Slru => "slru",
        }
    }

    /// A new, empty policy of this kind.
    pub fn make<K: Hash + Eq + Clone + Send + 'static>(self) -> Box<dyn Policy<K>> {
        match self {
            Self::Lru => Box::new(Lru::new()),
            Self::Lfu => Box::new(Lfu::new()),
            Self::Slru => Box::new(Slru::new()),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| UnknownPolicy(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("fifo".parse::<PolicyKind>().unwrap_err().to_string().contains("slru"));
    }

    /// Checks the trait's promises for every policy over random calls.
    #[test]
    fn victims_are_held_distinct_free_and_no_more_than_needed() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for kind in PolicyKind::ALL {
            let mut policy = kind.make::<u32>();
            let mut held = std::collections::BTreeMap::new();
            for _ in 0..4000 {
                let key = rng.random_range(0..60);
                match rng.random_range(0..4) {
                    0 => {
                        let cost = rng.random_range(1..9);
                        policy.insert(key, cost);
                        held.insert(key, cost);
                    }
                    1 => assert_eq!(policy.touch(&key), held.contains_key(&key)),
                    2 => assert_eq!(policy.remove(&key), held.remove(&key)),
                    _ => {
                        let room = rng.random_range(0..80);
                        let keep = |key: &u32| key.is_multiple_of(3);
                        let free: u64 =
                            held.iter().filter(|(key, _)| !keep(key)).map(|(_, c)| c).sum();
                        let victims = policy.victims(room, &keep);
                        assert_eq!(victims.is_some(), room <= free, "{kind}");
                        let victims = victims.unwrap_or_default();
                        let freed: Vec<u64> = victims.iter().map(|key| held[key]).collect();
                        assert!(victims.iter().all(|key| !keep(key)));
                        let mut distinct = victims.clone();
                        distinct.sort_unstable();
                        distinct.dedup();
                        assert_eq!(distinct.len(), victims.len(), "{kind}");
                        if let Some((_, others)) = freed.split_last() {
                            assert!(others.iter().sum::<u64>() < room, "{kind}: one too many");
                        }
                    }
                }
                assert_eq!(policy.total(), held.values().sum::<u64>(), "{kind}");
                assert_eq!(policy.cost(&key), held.get(&key).copied(), "{kind}");
            }
        }
    }
}
