//! Identities that two nodes use at once, for example because a data directory was copied. Pure:
//! the time is an argument.
//!
//! Each run of a node has an epoch, larger than those of all its earlier runs, and a random number.
//! If two runs have the same epoch, or an earlier run still speaks when a later one has begun, two
//! nodes use one identity. Peers notice it; the two nodes never hear each other, so the peers tell
//! them.
//!
//! Invariants: no repeated message and no late one is taken for a second node: an earlier run
//! must say several new things, some time apart, well after the later one began. (Whoever kept so
//! many of its messages back can cause a false warning, and nothing else.) What one peer claims
//! about another is reported as that peer's claim; the tables are bounded.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::PeerId;

use super::limits::{
    MEMBERS_MAX, TWIN_AGAIN, TWIN_FOR, TWIN_LATE, TWIN_PAUSE, TWIN_TELL, TWIN_WORDS, TWINS_MAX,
};
use super::peers::PeerMap;
use crate::wire::Stamp;

/// Two nodes with one identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    pub peer: PeerId,
    /// Where each of them is or was seen, as far as known.
    pub places: Vec<String>,
    /// The peer that says so; `None` if this node noticed it.
    pub told_by: Option<PeerId>,
}

/// A run of a peer, as far as it was heard.
struct Run {
    run: u64,
    /// Of its newest message.
    stamp: Stamp,
    place: String,
}

/// The runs of one peer: the latest, and the one before it.
struct Runs {
    latest: Run,
    /// When the latest run was first heard.
    since: Instant,
    before: Option<Run>,
    /// New messages of the earlier run since then, and when the last of them came.
    words: u32,
    word_at: Instant,
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
    runs: PeerMap<Box<Runs>>,
    seen: BTreeMap<PeerId, Seen>,
}

impl Twins {
    pub(super) fn len(&self) -> usize {
        self.seen.len()
    }

    /// Forgets the runs of peers that are silent.
    pub(super) fn expire(&mut self, now: Instant) {
        self.runs.retain(|_, runs| runs.spoke + TWIN_FOR > now);
    }

    /// Call when a peer's message with this stamp came from this run of it, which is at `place`.
    /// Returns what that shows.
    pub(super) fn hear(
        &mut self,
        now: Instant,
        peer: PeerId,
        (run, stamp): (u64, Stamp),
        place: &dyn Fn() -> String,
    ) -> Option<Twin> {
        if run == 0 {
            return None;
        }
        // The place of a run is where it was first heard: most messages are of a known one.
        if let Some(runs) = self.runs.get_mut(&peer)
            && (runs.latest.run, runs.latest.stamp.epoch) == (run, stamp.epoch)
        {
            runs.spoke = now;
            runs.latest.stamp = runs.latest.stamp.max(stamp);
            return None;
        }
        if self.runs.len() >= MEMBERS_MAX && !self.runs.contains_key(&peer) {
            return None;
        }
        let this = Run { run, stamp, place: place() };
        let Some(runs) = self.runs.get_mut(&peer) else {
            let runs =
                Runs { latest: this, since: now, before: None, words: 0, word_at: now, spoke: now };
            self.runs.insert(peer, Box::new(runs));
            return None;
        };
        let is_twin = if stamp.epoch > runs.latest.stamp.epoch {
            runs.before = Some(std::mem::replace(&mut runs.latest, this));
            (runs.since, runs.words, runs.spoke) = (now, 0, now);
            false
        } else if stamp.epoch < runs.latest.stamp.epoch {
            runs.earlier(now, this)
        } else {
            runs.before = Some(this);
            true
        };
        let runs = self.runs.get(&peer).filter(|_| is_twin)?;
        let places = [Some(&runs.latest), runs.before.as_ref()];
        let places = places.into_iter().flatten().map(|run| run.place.clone()).collect();
        Some(Twin { peer, places, told_by: None })
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

impl Runs {
    /// A message of an earlier run than the latest. True if it shows that the earlier one lives.
    fn earlier(&mut self, now: Instant, this: Run) -> bool {
        let is_new = match &self.before {
            Some(before) if before.stamp.epoch == this.stamp.epoch => {
                before.run == this.run && this.stamp > before.stamp
            }
            Some(before) => before.stamp.epoch < this.stamp.epoch,
            None => true,
        };
        if !is_new {
            return false;
        }
        let is_same = self.before.as_ref().is_some_and(|before| before.run == this.run);
        self.before = Some(this);
        if now < self.since + TWIN_LATE || self.words > 0 && now < self.word_at + TWIN_PAUSE {
            return false;
        }
        self.words = if is_same { self.words.saturating_add(1) } else { 1 };
        self.word_at = now;
        self.words >= TWIN_WORDS
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn stamp(epoch: u64, sequence: u64) -> Stamp {
        Stamp { epoch, sequence }
    }

    #[test]
    fn two_nodes_are_told_from_one_that_starts_again() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let peer = PeerId::from_seed([1; 32]);
        let mut twins = Twins::default();
        // One that sends no number, one that restarts again and again, one that moves.
        for second in 0..60 {
            assert_eq!(twins.hear(at(second), peer, (0, stamp(1, second)), &|| "a".into()), None);
            let (run, epoch) = (100 + second, 1 + second);
            assert_eq!(twins.hear(at(second), peer, (run, stamp(epoch, 1)), &|| "a".into()), None);
            let other = PeerId::from_seed([2; 32]);
            let place = if second < 9 { "a" } else { "b" };
            assert_eq!(
                twins.hear(at(second), other, (7, stamp(1, second + 1)), &|| place.into()),
                None
            );
            // Messages of earlier runs arrive late, or again.
            let (run, epoch) = (100 + second / 2, 1 + second / 2);
            assert_eq!(twins.hear(at(second), peer, (run, stamp(epoch, 1)), &|| "a".into()), None);
        }
        assert_eq!(twins.now(at(60)), []);
        // A copy of the data directory begins a later run, and the earlier one does not end.
        let (one, other) = ((1, 100), (2, 200));
        let mut told = Vec::new();
        for second in 61..140 {
            let (run, epoch) = if second % 2 == 0 && second > 64 { other } else { one };
            let place = if run == 1 { "a" } else { "b" };
            let seen = twins.hear(at(second), peer, (run, stamp(epoch, second)), &|| place.into());
            let Some(twin) = seen else { continue };
            assert_eq!(twin, Twin { peer, places: vec!["b".into(), "a".into()], told_by: None });
            told.extend(twins.note(at(second), twin).map(|_| second));
        }
        assert_eq!(told.len(), 1, "the owner is told once");
        let waited = told[0] - 66;
        assert!(waited >= TWIN_LATE.as_secs() && waited < 40, "after {waited} s");
        assert!(twins.may_tell(at(140), peer) && !twins.may_tell(at(141), peer));
        assert_eq!(twins.now(at(140)).len(), 1);
        assert_eq!(twins.now(at(140) + TWIN_FOR), [], "one of them was stopped");
    }

    #[test]
    fn two_runs_of_one_epoch_are_two_nodes() {
        let now = Instant::now();
        let peer = PeerId::from_seed([1; 32]);
        let mut twins = Twins::default();
        assert_eq!(twins.hear(now, peer, (1, stamp(5, 9)), &|| "a".into()), None);
        let seen = twins.hear(now, peer, (2, stamp(5, 1)), &|| "b".into()).unwrap();
        assert_eq!(seen.places, ["a", "b"]);
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
