//! Models that are loaded and that no request needs at present.
//!
//! All loaded models share the device's budget. The one that was not used for longest goes first:
//! when another model lacks room, when the caches of the one that answers do, or when nobody has
//! asked for it for long enough. Bounded by number and by bytes.

use std::time::{Duration, Instant};

use doppler_infer::engine::Engine;
use doppler_infer::sequence::Sequence;
use doppler_store::ModelId;

use super::kept::Kept;
use crate::api::Hits;

/// The most models loaded at once.
pub const LOADED_MAX: usize = 8;

/// A model in memory.
pub(super) struct Loaded {
    pub model: ModelId,
    pub name: String,
    pub engine: Engine,
    /// Sequences of requests that asked to keep them. They are dropped before room is refused to
    /// anyone.
    pub kept: Kept<Sequence>,
    /// Hits that were counted.
    pub counted: Hits,
    /// Of an embedding model: the longest text, in tokens, for which it was loaded.
    pub embeds: Option<usize>,
    /// When its last request ended.
    pub used: Instant,
    /// Tokens a second at which prompts were read from disk.
    pub restores: Option<f64>,
}

/// What is loaded, as the shelf sees it.
pub(super) trait Held {
    fn model(&self) -> ModelId;

    /// Bytes of the device that it holds.
    fn bytes(&self) -> u64;

    /// When its last request ended.
    fn used(&self) -> Instant;
}

impl Held for Loaded {
    fn model(&self) -> ModelId {
        self.model
    }

    fn bytes(&self) -> u64 {
        self.engine.stats().device_bytes()
    }

    fn used(&self) -> Instant {
        self.used
    }
}

/// Models set aside, the one used last at the end.
pub(super) struct Shelf<L>(Vec<L>);

impl<L> Default for Shelf<L> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<L: Held> Shelf<L> {
    /// Sets a model aside. Returns the one not used for longest if there are too many.
    pub fn put(&mut self, loaded: L) -> Option<L> {
        self.0.push(loaded);
        // One more answers.
        if self.0.len() < LOADED_MAX { None } else { self.drop_one() }
    }

    /// Takes a model off the shelf.
    pub fn take(&mut self, model: ModelId) -> Option<L> {
        let at = self.0.iter().position(|loaded| loaded.model() == model)?;
        Some(self.0.remove(at))
    }

    /// Gives models up, until another of `need` bytes fits beside the rest within `budget`, or none
    /// is left.
    pub fn make_room(&mut self, budget: u64, need: u64) -> Vec<L> {
        let mut gone = Vec::new();
        while budget.saturating_sub(self.bytes()) < need
            && let Some(loaded) = self.drop_one()
        {
            gone.push(loaded);
        }
        gone
    }

    /// Gives up the model not used for longest.
    pub fn drop_one(&mut self) -> Option<L> {
        if self.0.is_empty() { None } else { Some(self.0.remove(0)) }
    }

    /// Gives up those whose last request ended at or before `since`.
    pub fn expire(&mut self, since: Instant) -> Vec<L> {
        self.0.extract_if(.., |loaded| loaded.used() <= since).collect()
    }

    /// Gives up all.
    pub fn drop_all(&mut self) -> Vec<L> {
        std::mem::take(&mut self.0)
    }

    /// Bytes of the device that all of them hold.
    pub fn bytes(&self) -> u64 {
        self.iter().map(Held::bytes).sum()
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &L> {
        self.0.iter()
    }
}

/// When the first of these is to be unloaded, if a model stays for `keep_alive` after its last
/// request.
pub(super) fn due(
    used: impl Iterator<Item = Instant>,
    keep_alive: Option<Duration>,
) -> Option<Instant> {
    used.min()?.checked_add(keep_alive?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing(u8, u64, Instant);

    impl Held for Thing {
        fn model(&self) -> ModelId {
            ModelId::of(&[self.0])
        }

        fn bytes(&self) -> u64 {
            self.1
        }

        fn used(&self) -> Instant {
            self.2
        }
    }

    fn names(shelf: &Shelf<Thing>) -> Vec<u8> {
        shelf.iter().map(|thing| thing.0).collect()
    }

    #[test]
    fn room_is_made_by_those_not_used_for_longest_and_no_more_than_needed() {
        let now = Instant::now();
        let mut shelf = Shelf::default();
        for name in 1..=4 {
            assert!(shelf.put(Thing(name, 10 * u64::from(name), now)).is_none());
        }
        assert!(shelf.make_room(150, 50).is_empty(), "it fits beside them");
        assert_eq!(shelf.make_room(150, 51)[0].0, 1);
        assert_eq!(names(&shelf), [2, 3, 4]);
        let used = shelf.take(ModelId::of(&[2])).unwrap();
        shelf.put(used);
        assert_eq!(shelf.make_room(150, 100).len(), 2);
        assert_eq!(names(&shelf), [2], "3 and 4 were used before 2");
        assert_eq!(shelf.make_room(10, 10).len(), 1);
        assert!(names(&shelf).is_empty() && shelf.drop_one().is_none());
        assert!(shelf.make_room(10, 20).is_empty());
        assert!(shelf.take(ModelId::of(&[2])).is_none());
    }

    #[test]
    fn there_are_never_more_than_the_bound_with_the_one_that_answers() {
        let now = Instant::now();
        let mut shelf = Shelf::default();
        let gone: Vec<Thing> = (0..20).filter_map(|name| shelf.put(Thing(name, 1, now))).collect();
        assert_eq!((gone.len(), gone[0].0), (21 - LOADED_MAX, 0));
        assert_eq!(shelf.iter().count(), LOADED_MAX - 1);
        assert_eq!((names(&shelf)[0], shelf.bytes()), (13, LOADED_MAX as u64 - 1));
    }

    #[test]
    fn whoever_nobody_asks_for_goes_in_time() {
        let second = Duration::from_secs(1);
        let at = |seconds: u32| Instant::now() + seconds * second;
        let (early, late) = (at(1), at(5));
        let mut shelf = Shelf::default();
        shelf.put(Thing(1, 1, late));
        shelf.put(Thing(2, 1, early));
        let used = || [late, early].into_iter();
        assert_eq!(due(used(), Some(second)), Some(early + second));
        assert_eq!(due(used(), None), None);
        assert_eq!(due(used(), Some(Duration::MAX)), None, "that is as good as for ever");
        assert_eq!(due(std::iter::empty(), Some(second)), None);
        assert!(shelf.expire(early - second).is_empty());
        assert_eq!(shelf.expire(early)[0].0, 2);
        assert_eq!(names(&shelf), [1]);
    }
}
