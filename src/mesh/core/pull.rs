//! How the missing objects of a model are fetched: in which order, how many at a time, and what a
//! failure means.
//!
//! Objects of which a part is here come first, then the rarest, so that a peer that leaves takes as
//! little as possible with it. Rarity is evaluated when the next object begins. The first failure
//! ends the pull: what has arrived is kept, and fetches in flight are cancelled. Invariant: each
//! object is fetched at most once, at most `at_once` of them at the same time.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::ShardId;

use super::meter::{Meter, Progress};

/// An object that is not complete here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub shard: ShardId,
    /// Its size in bytes, and how many of them are here.
    pub size: u64,
    pub held: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullEvent {
    /// It begins.
    Begin,
    /// An object is complete here, and pinned.
    Fetched(ShardId),
    /// An object could not be fetched.
    Failed(ShardId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullAction {
    Fetch(Wanted),
    /// Everything is here.
    Done,
    /// Cancel what is in flight. This many objects, and bytes in total, are still missing.
    GiveUp {
        objects: usize,
    },
}

/// One pull.
#[derive(Debug)]
pub struct Pull {
    waiting: Vec<Wanted>,
    under_way: BTreeMap<ShardId, Wanted>,
    at_once: usize,
    /// Bytes of fetched objects, without what was here before.
    fetched: u64,
    meter: Meter,
    is_over: bool,
}

impl Pull {
    /// An object that occurs twice is fetched once.
    pub fn new(now: Instant, missing: impl IntoIterator<Item = Wanted>, at_once: usize) -> Self {
        let by_id: BTreeMap<ShardId, Wanted> =
            missing.into_iter().map(|wanted| (wanted.shard, wanted)).collect();
        let waiting: Vec<Wanted> = by_id.into_values().collect();
        let total = waiting.iter().map(Wanted::missing).sum();
        Self {
            waiting,
            under_way: BTreeMap::new(),
            at_once: at_once.max(1),
            fetched: 0,
            meter: Meter::new(now, total),
            is_over: false,
        }
    }

    /// `holders` says how many peers hold an object or some of it.
    pub fn on(&mut self, event: PullEvent, holders: &dyn Fn(ShardId) -> usize) -> Vec<PullAction> {
        if self.is_over {
            return Vec::new();
        }
        match event {
            PullEvent::Begin => {}
            PullEvent::Fetched(shard) => {
                let wanted = self.under_way.remove(&shard);
                self.fetched += wanted.as_ref().map_or(0, Wanted::missing);
            }
            PullEvent::Failed(shard) => {
                if self.under_way.contains_key(&shard) {
                    self.is_over = true;
                    let objects = self.under_way.len() + self.waiting.len();
                    return vec![PullAction::GiveUp { objects }];
                }
            }
        }
        let mut actions = Vec::new();
        while self.under_way.len() < self.at_once {
            let order = |wanted: &Wanted| (wanted.held == 0, holders(wanted.shard), wanted.shard);
            let next = (0..self.waiting.len()).min_by_key(|at| order(&self.waiting[*at]));
            let Some(next) = next else { break };
            let wanted = self.waiting.swap_remove(next);
            self.under_way.insert(wanted.shard, wanted);
            actions.push(PullAction::Fetch(wanted));
        }
        if self.under_way.is_empty() {
            self.is_over = true;
            actions.push(PullAction::Done);
        }
        actions
    }

    /// Its progress. `coming` gives the proved bytes of an object in flight.
    pub fn progress(&mut self, now: Instant, coming: &dyn Fn(ShardId) -> u64) -> Progress {
        let coming: u64 =
            self.under_way.values().map(|wanted| coming(wanted.shard).min(wanted.missing())).sum();
        self.meter.note(now, self.fetched + coming)
    }
}

impl Wanted {
    const fn missing(&self) -> u64 {
        self.size.saturating_sub(self.held)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn wanted(byte: u8, held: u64) -> Wanted {
        Wanted { shard: ShardId::from([byte; 32]), size: 100, held }
    }

    fn shard(byte: u8) -> ShardId {
        ShardId::from([byte; 32])
    }

    #[test]
    fn begun_objects_come_first_then_the_rarest_two_at_a_time() {
        let now = Instant::now();
        let all = [wanted(1, 0), wanted(2, 0), wanted(3, 0), wanted(4, 60), wanted(2, 0)];
        let mut pull = Pull::new(now, all, 2);
        let holders = |id: ShardId| if id == shard(3) { 1 } else { 5 };
        let fetch = |byte, held| PullAction::Fetch(wanted(byte, held));
        assert_eq!(pull.on(PullEvent::Begin, &holders), [fetch(4, 60), fetch(3, 0)]);
        // An object that has become rare meanwhile is next.
        let later = |id: ShardId| usize::from(id != shard(2));
        assert_eq!(pull.on(PullEvent::Fetched(shard(3)), &later), [fetch(2, 0)]);
        let half = pull.progress(now + Duration::from_secs(1), &|_| 50);
        assert_eq!((half.done, half.total), (100 + 40 + 50, 340), "object 4 lacked only 40");
        assert_eq!(half.rate, Some(190.0));
        assert_eq!(pull.on(PullEvent::Fetched(shard(4)), &later), [fetch(1, 0)]);
        assert_eq!(pull.on(PullEvent::Fetched(shard(1)), &later), []);
        assert_eq!(pull.on(PullEvent::Fetched(shard(2)), &later), [PullAction::Done]);
        assert_eq!(pull.progress(now + Duration::from_secs(2), &|_| 0).done, 340);
    }

    #[test]
    fn the_first_failure_ends_it() {
        let now = Instant::now();
        let mut pull = Pull::new(now, (0..5).map(|byte| wanted(byte, 0)), 2);
        let holders = |_: ShardId| 1;
        assert_eq!(pull.on(PullEvent::Begin, &holders).len(), 2);
        assert_eq!(pull.on(PullEvent::Fetched(shard(0)), &holders).len(), 1);
        assert_eq!(pull.on(PullEvent::Failed(shard(9)), &holders), [], "not one of its own");
        let over = pull.on(PullEvent::Failed(shard(1)), &holders);
        assert_eq!(over, [PullAction::GiveUp { objects: 4 }]);
        assert_eq!(pull.on(PullEvent::Fetched(shard(2)), &holders), []);
        let mut nothing = Pull::new(now, [], 2);
        assert_eq!(nothing.on(PullEvent::Begin, &holders), [PullAction::Done]);
    }
}
