//! How large the swarm is, and the pace that follows from that. Pure: the time is an argument.
//!
//! Up to [`CROWD`] members everybody knows everybody. Beyond, a node knows some of them, and
//! estimates the number from their promises: whoever speaks every three hundred seconds and was
//! heard in the last thirty stands for ten. The larger the swarm, the longer is each node's round, so that
//! what all say together stays the same.
//!
//! Invariants: an author counts once in a window, however much it says, and for no more than a
//! lease's worth; the table is bounded.

use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::Core;
use super::limits::{BEAT_SHARE, CROWD_SAMPLES_MAX, CROWD_WINDOW, Timing};
use super::peers::{DigestMap, digest};

/// Messages of its run that a newcomer says before it knows the swarm's pace.
const NEWCOMER_WORDS: u64 = 3;
/// From this many members on, a promise depends on their number.
const PACED: usize = 40;

/// The shortest promise that depends on the number of members.
fn paced() -> Duration {
    Timing::default().beat(PACED)
}

pub(super) struct Crowd {
    window_ends: Instant,
    /// What each author of this window promised, in milliseconds, and whether it knows the pace; and what
    /// those of the last window promised together.
    promises: DigestMap<(u32, bool)>,
    last: Option<u64>,
}

impl Crowd {
    pub(super) fn new(now: Instant) -> Self {
        Self { window_ends: now + CROWD_WINDOW, promises: DigestMap::default(), last: None }
    }

    pub(super) fn len(&self) -> usize {
        self.promises.len()
    }

    /// A peer has spoken, and promised to speak again within `next`. `words`: how many messages of its
    /// run it has said, this one included.
    pub(super) fn hear(&mut self, now: Instant, peer: PeerId, next: Duration, words: u64) {
        if now >= self.window_ends {
            // If whole windows passed in silence, nobody spoke in the last one.
            let is_next = now < self.window_ends + CROWD_WINDOW;
            let sum = self.promises.values().map(|(next, _)| u64::from(*next)).sum();
            self.last = Some(if is_next { sum } else { 0 });
            self.promises.clear();
            self.window_ends = now + CROWD_WINDOW;
        }
        // Whoever promises what only a larger swarm asks for has heard of it.
        let is_told = words > NEWCOMER_WORDS || next >= paced();
        let promise = (u32::try_from(next.as_millis()).unwrap_or(u32::MAX), is_told);
        let is_full = self.promises.len() >= CROWD_SAMPLES_MAX;
        match self.promises.entry(digest(peer)) {
            Entry::Occupied(mut known) => *known.get_mut() = promise,
            Entry::Vacant(place) if !is_full => {
                place.insert(promise);
            }
            Entry::Vacant(_) => {}
        }
    }

    /// The number of members that the promises stand for. A newcomer believes what the others say
    /// about the pace until it has listened for a window; but not what other newcomers say that have
    /// not heard of it either.
    pub(super) fn size(&self) -> usize {
        let millis = match self.last {
            Some(last) => u128::from(last) / CROWD_WINDOW.as_millis(),
            None => {
                let promises = self.promises.values().filter(|(_, is_told)| *is_told);
                let mut promises: Vec<u32> = promises.map(|(next, _)| *next).collect();
                let half = promises.len() / 2;
                let median = match promises.is_empty() {
                    true => 0,
                    false => *promises.select_nth_unstable(half).1,
                };
                let median = Duration::from_millis(median.into());
                if median >= paced() { median.as_millis() / BEAT_SHARE.as_millis() } else { 0 }
            }
        };
        usize::try_from(millis).unwrap_or(usize::MAX)
    }

    /// The same as of the last whole window; 0 before there was one.
    pub(super) fn steady_size(&self) -> usize {
        if self.last.is_some() { self.size() } else { 0 }
    }
}

impl Core {
    /// The number of members, exact up to [`super::limits::CROWD`].
    pub fn size(&self) -> usize {
        self.crowd.size().max(self.membership.len() + 1)
    }

    /// How long others believe what this node holds.
    pub(super) fn lease(&self) -> Duration {
        self.config.timing.lease_in(self.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u32) -> PeerId {
        let mut seed = [0; 32];
        seed[..4].copy_from_slice(&number.to_le_bytes());
        PeerId::from_seed(seed)
    }

    #[test]
    fn a_crowd_is_as_large_as_its_members_promises_say() {
        let start = Instant::now();
        let beat = Timing::default().beat(3000);
        let mut crowd = Crowd::new(start);
        // Each of 3,000 members speaks once in this time; here those of three windows. Most of the
        // others that are heard at first are newcomers, too.
        let each = beat / 3000;
        for number in 0..(3 * CROWD_WINDOW.as_millis() / each.as_millis()) as u32 {
            crowd.hear(start + each * number, peer(number), beat, 9);
            if number < 10 {
                for newcomer in 0..3 {
                    let newcomer = peer(100_000 + 3 * number + newcomer);
                    crowd.hear(start + each * number, newcomer, Duration::from_secs(3), 2);
                }
            }
            if number == 10 {
                assert_eq!(crowd.size(), 3000, "a newcomer is told the pace");
            }
        }
        let size = crowd.size();
        assert!((2700..3300).contains(&size), "{size}");
        // One that talks all the time counts once.
        let later = start + 4 * CROWD_WINDOW;
        for number in 0..2000 {
            crowd.hear(
                later + Duration::from_millis(number),
                peer(1),
                Duration::from_secs(3600),
                9,
            );
        }
        crowd.hear(later + CROWD_WINDOW, peer(2), beat, 9);
        assert!(crowd.size() <= 120, "{}", crowd.size());
    }

    #[test]
    fn a_newcomer_that_was_told_the_pace_passes_it_on() {
        let now = Instant::now();
        let beat = Timing::default().beat(3000);
        let mut crowd = Crowd::new(now);
        // In a crowd nobody speaks often: most have said one word.
        for number in 0..3 {
            crowd.hear(now, peer(number), beat, 1);
            crowd.hear(now, peer(100 + number), Duration::from_millis(3343), 1);
        }
        assert_eq!(crowd.size(), 3000);
    }

    #[test]
    fn the_table_is_bounded() {
        let now = Instant::now();
        let mut crowd = Crowd::new(now);
        for number in 0..CROWD_SAMPLES_MAX as u32 + 50 {
            crowd.hear(now, peer(number), Duration::from_secs(1), 9);
        }
        assert_eq!(crowd.len(), CROWD_SAMPLES_MAX);
    }
}
