//! Identities that two nodes use at once, for example because a data directory was copied. Pure:
//! the time is an argument.
//!
//! A node puts a number into every message about itself, drawn at random when it starts. A restart
//! changes the number once. If an earlier number comes back, two nodes use one identity. Peers
//! notice it; the two nodes never hear each other, so the peers tell them.
//!
//! Invariants: a repeated or late message changes nothing, because only messages newer than all
//! earlier ones of the peer count, as long as the peer is remembered; what one peer claims about
//! another is reported as that peer's claim; the tables are bounded.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::PeerId;

use super::limits::{MEMBERS_MAX, TWIN_AGAIN, TWIN_FOR, TWIN_TELL, TWINS_MAX};

/// Two nodes with one identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    pub peer: PeerId,
    /// Where each of them is or was seen, as far as known.
    pub places: Vec<String>,
    /// The peer that says so; `None` if this node noticed it.
    pub told_by: Option<PeerId>,
}

/// The runs of one peer: the one that sent the last message, and the one before.
struct Runs {
    run: u64,
    /// The sequence number of its newest message, whichever run sent it.
    sequence: u64,
    place: String,
    before: Option<(u64, String)>,
    spoke: Instant,
}

struct Seen {
    twin: Twin,
    at: Instant,
    told: Instant,
    /// When the two nodes were told.
    they_know: Option<Instant>,
}

/// What is known of such identities.
#[derive(Default)]
pub(super) struct Twins {
    runs: BTreeMap<PeerId, Runs>,
    seen: BTreeMap<PeerId, Seen>,
}

impl Twins {
    pub(super) fn len(&self) -> usize {
        self.seen.len()
    }

    /// Call when a peer's message with this sequence number came from this run of it, which is at
    /// `place`. Returns what that shows.
    pub(super) fn hear(
        &mut self,
        now: Instant,
        peer: PeerId,
        (run, sequence): (u64, u64),
        place: &str,
    ) -> Option<Twin> {
        if run == 0 {
            return None;
        }
        self.runs.retain(|_, runs| runs.spoke + TWIN_FOR > now);
        if !self.runs.contains_key(&peer) && self.runs.len() >= MEMBERS_MAX {
            return None;
        }
        let place = place.to_owned();
        let fresh = || Runs { run, sequence: 0, place: place.clone(), before: None, spoke: now };
        let runs = self.runs.entry(peer).or_insert_with(fresh);
        if sequence <= runs.sequence {
            return None;
        }
        (runs.spoke, runs.sequence) = (now, sequence);
        if runs.run == run {
            runs.place = place;
            return None;
        }
        let last = (runs.run, std::mem::replace(&mut runs.place, place.clone()));
        let came_back = runs.before.as_ref().is_some_and(|(before, _)| *before == run);
        runs.run = run;
        let other = last.1.clone();
        runs.before = Some(last);
        if !came_back {
            return None;
        }
        Some(Twin { peer, places: vec![other, place], told_by: None })
    }

    /// Call when two nodes were seen to use this identity. Returns it if it is to be reported, but
    /// not twice within [`TWIN_AGAIN`].
    pub(super) fn note(&mut self, now: Instant, twin: Twin) -> Option<Twin> {
        self.seen.retain(|_, seen| seen.told + TWIN_AGAIN > now);
        if let Some(seen) = self.seen.get_mut(&twin.peer) {
            // What this node noticed itself counts for more than what it was told.
            if seen.twin.told_by.is_some() || twin.told_by.is_none() {
                seen.twin = twin;
            }
            seen.at = now;
            return None;
        }
        if self.seen.len() < TWINS_MAX {
            let seen = Seen { twin: twin.clone(), at: now, told: now, they_know: None };
            self.seen.insert(twin.peer, seen);
            return Some(twin);
        }
        None
    }

    /// Identities that two nodes were recently seen to use.
    pub(super) fn now(&self, now: Instant) -> Vec<Twin> {
        let seen = self.seen.values().filter(|seen| seen.at + TWIN_FOR > now);
        seen.map(|seen| seen.twin.clone()).collect()
    }

    /// Whether the two nodes of an identity are to be told of each other now. If so, they count as
    /// told.
    pub(super) fn may_tell(&mut self, now: Instant, peer: PeerId) -> bool {
        let Some(seen) = self.seen.get_mut(&peer) else { return false };
        let is_due = seen.they_know.is_none_or(|at| at + TWIN_TELL <= now);
        if is_due {
            seen.they_know = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn two_nodes_are_told_from_one_that_starts_again() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let peer = PeerId::from_seed([1; 32]);
        let mut twins = Twins::default();
        // One that sends no number, one that restarts again and again, one that moves.
        for second in 0..20 {
            assert_eq!(twins.hear(at(second), peer, (0, second + 1), "a"), None);
            assert_eq!(twins.hear(at(second), peer, (100 + second, second + 1), "a"), None);
            let other = PeerId::from_seed([2; 32]);
            let place = if second < 9 { "a" } else { "b" };
            assert_eq!(twins.hear(at(second), other, (7, second + 1), place), None);
            // A message of an earlier run arrives late, or again.
            assert_eq!(twins.hear(at(second), peer, (100, 1), "a"), None);
        }
        assert_eq!(twins.now(at(20)), []);
        assert_eq!(twins.hear(at(21), peer, (1, 21), "a"), None);
        assert_eq!(twins.hear(at(22), peer, (2, 22), "b"), None);
        let twin = Twin { peer, places: vec!["b".into(), "a".into()], told_by: None };
        assert_eq!(twins.hear(at(23), peer, (1, 23), "a"), Some(twin.clone()));
        assert_eq!(twins.note(at(23), twin.clone()), Some(twin.clone()));
        let mut told = 0;
        for second in 24..60 {
            let (run, place) = if second % 2 == 0 { (2, "b") } else { (1, "a") };
            let seen = twins.hear(at(second), peer, (run, second), place).unwrap();
            assert_eq!(twins.note(at(second), seen), None, "the owner is told once");
            told += u32::from(twins.may_tell(at(second), peer));
        }
        assert_eq!(told, 4, "the two are told again and again");
        assert_eq!(twins.now(at(60)), [twin]);
        assert_eq!(twins.now(at(60) + TWIN_FOR), [], "one of them was stopped");
    }

    #[test]
    fn the_word_of_others_is_told_as_theirs_once() {
        let now = Instant::now();
        let [peer, teller] = [1, 2].map(|seed| PeerId::from_seed([seed; 32]));
        let mut twins = Twins::default();
        let told = Twin { peer, places: Vec::new(), told_by: Some(teller) };
        assert_eq!(twins.note(now, told.clone()), Some(told.clone()));
        assert_eq!(twins.note(now, told), None);
        assert!(!twins.may_tell(now, teller), "nothing is known of it");
        for seed in 10..200 {
            let peer = PeerId::from_seed([seed; 32]);
            twins.note(now, Twin { peer, places: Vec::new(), told_by: None });
        }
        assert_eq!(twins.now(now).len(), TWINS_MAX);
    }
}
