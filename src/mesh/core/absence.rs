//! Peers that seem to be gone. A lease may outlive its peer by half a minute, and healing should
//! not wait for its end.
//!
//! A node that loses its connection to a peer, or waits in vain for its next heartbeat, says so
//! once (a doubt). If the peer is alive, it speaks as soon as it hears the doubt. If it does not,
//! every node that heard the doubt considers it missing. Without a doubt, a lost connection
//! followed by silence means the same. A peer that has answered the doubt of its lost connection
//! is alive without it: only its silence causes another. Invariant: a peer that was never disconnected, doubted or
//! overdue, or has spoken since, is not missing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use doppler_ids::PeerId;

use super::limits::{DOUBT_AFTER, DOUBT_FOR, DOUBTS_MAX, MISSING_AFTER, PEERS_REMEMBERED_MAX};

/// A lost connection.
struct Lost {
    since: Instant,
    /// The peer has answered a doubt since then.
    has_answered: bool,
}

/// When each peer was disconnected, and when it was first doubted.
#[derive(Default)]
pub(super) struct Absence {
    gone: BTreeMap<PeerId, Lost>,
    doubted: BTreeMap<PeerId, Instant>,
}

impl Absence {
    /// Notes which peers were connected `before` and which are `after`.
    pub(super) fn update(
        &mut self,
        now: Instant,
        before: &BTreeSet<PeerId>,
        after: &BTreeSet<PeerId>,
    ) {
        self.gone.retain(|peer, _| !after.contains(peer));
        for gone in before.difference(after) {
            if self.gone.len() < PEERS_REMEMBERED_MAX {
                self.gone.insert(*gone, Lost { since: now, has_answered: false });
            }
        }
    }

    /// A node has lost a peer. The first doubt since the peer last spoke counts. True if it is the
    /// first.
    pub(super) fn doubt(&mut self, now: Instant, peer: PeerId) -> bool {
        if self.doubted.len() >= PEERS_REMEMBERED_MAX || self.doubted.contains_key(&peer) {
            return false;
        }
        self.doubted.insert(peer, now);
        true
    }

    /// A peer said something new.
    pub(super) fn spoke(&mut self, peer: PeerId) {
        if self.doubted.remove(&peer).is_some()
            && let Some(lost) = self.gone.get_mut(&peer)
        {
            lost.has_answered = true;
        }
    }

    /// The peers whose doubt this node should publish now: those that are lost, and those whose
    /// next word is `overdue`. They count as doubted from now on.
    pub(super) fn take_doubts(&mut self, now: Instant, overdue: Vec<PeerId>) -> Vec<PeerId> {
        let is_due = |lost: &Lost| !lost.has_answered && now >= lost.since + DOUBT_AFTER;
        let lost = self.gone.iter().filter(|(_, lost)| is_due(lost));
        let all: BTreeSet<PeerId> = lost.map(|(peer, _)| *peer).chain(overdue).collect();
        let due = all.into_iter().filter(|peer| !self.doubted.contains_key(peer));
        let due: Vec<PeerId> = due.take(DOUBTS_MAX).collect();
        for peer in &due {
            self.doubt(now, *peer);
        }
        due
    }

    /// Forgets the peers that are not known otherwise.
    pub(super) fn retain(&mut self, is_known: impl Fn(PeerId) -> bool) {
        self.gone.retain(|peer, _| is_known(*peer));
        self.doubted.retain(|peer, _| is_known(*peer));
    }

    /// The number of peers that are disconnected or doubted, whichever is larger.
    pub(super) fn len(&self) -> usize {
        self.gone.len().max(self.doubted.len())
    }

    /// Whether a peer was doubted so long ago that it would have spoken by now, or is disconnected
    /// and silent. `silent_at` is the time at which its next message is overdue.
    pub(super) fn is_missing(&self, now: Instant, peer: PeerId, silent_at: Instant) -> bool {
        let doubted = self.doubted.get(&peer).is_some_and(|since| now >= *since + DOUBT_FOR);
        let gone = self.gone.get(&peer).is_some_and(|lost| now >= lost.since + MISSING_AFTER);
        doubted || gone && now >= silent_at
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peers() -> (PeerId, PeerId) {
        (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]))
    }

    #[test]
    fn who_left_is_missing_after_a_while_until_it_is_back() {
        let now = Instant::now();
        let (one, other) = peers();
        let (both, none) = (BTreeSet::from([one, other]), BTreeSet::new());
        let mut absence = Absence::default();
        absence.update(now, &none, &both);
        absence.update(now, &both, &BTreeSet::from([one]));
        let later = now + MISSING_AFTER;
        assert!(!absence.is_missing(later - Duration::from_millis(1), other, now));
        assert!(absence.is_missing(later, other, now) && !absence.is_missing(later, one, now));
        assert!(!absence.is_missing(later, other, later + MISSING_AFTER), "it spoke lately");
        absence.update(later, &BTreeSet::from([one]), &both);
        assert!(!absence.is_missing(later + MISSING_AFTER, other, now));
        absence.update(later, &both, &none);
        absence.retain(|peer| peer == one);
        assert!(absence.is_missing(later + MISSING_AFTER, one, now));
        assert!(!absence.is_missing(later + MISSING_AFTER, other, now));
    }

    #[test]
    fn who_is_doubted_and_does_not_speak_is_missing() {
        let now = Instant::now();
        let (one, other) = peers();
        let far = now + Duration::from_secs(3600);
        let mut absence = Absence::default();
        absence.update(now, &BTreeSet::from([one, other]), &BTreeSet::from([one]));
        assert_eq!(absence.take_doubts(now, vec![]), [], "it may be back in a moment");
        let doubted = now + DOUBT_AFTER;
        assert_eq!(absence.take_doubts(doubted, vec![]), [other]);
        assert_eq!(absence.take_doubts(doubted, vec![other]), [], "once");
        absence.doubt(doubted + DOUBT_FOR / 2, other);
        assert!(!absence.is_missing(doubted + DOUBT_FOR / 2, other, far));
        assert!(absence.is_missing(doubted + DOUBT_FOR, other, far), "the first doubt counts");
        absence.spoke(other);
        assert!(!absence.is_missing(doubted + DOUBT_FOR, other, far));
        // Another's word is enough.
        assert!(absence.doubt(doubted, one) && !absence.doubt(doubted, one));
        assert!(absence.is_missing(doubted + DOUBT_FOR, one, far));
        // So is an overdue word, whether it was connected or not.
        let never_met = PeerId::from_seed([3; 32]);
        assert!(absence.take_doubts(doubted, vec![never_met]).contains(&never_met));
        assert!(absence.is_missing(doubted + DOUBT_FOR, never_met, far));
    }
    #[test]
    fn who_lives_without_a_connection_is_doubted_once_and_again_when_it_is_silent() {
        let now = Instant::now();
        let (one, other) = peers();
        let mut absence = Absence::default();
        absence.update(now, &BTreeSet::from([one, other]), &BTreeSet::from([one]));
        let second = |n| now + Duration::from_secs(n);
        absence.spoke(other);
        assert_eq!(absence.take_doubts(second(1), vec![]), [other], "nobody had asked it");
        for n in 2..60 {
            absence.spoke(other);
            assert_eq!(absence.take_doubts(second(n), vec![]), [], "it has answered");
        }
        assert_eq!(absence.take_doubts(second(60), vec![other]), [other]);
        assert!(absence.is_missing(second(63), other, second(99)));
        // It is connected and lost again.
        absence.spoke(other);
        absence.update(second(64), &BTreeSet::from([one]), &BTreeSet::from([one, other]));
        absence.update(second(65), &BTreeSet::from([one, other]), &BTreeSet::from([one]));
        assert_eq!(absence.take_doubts(second(66), vec![]), [other]);
    }
}
