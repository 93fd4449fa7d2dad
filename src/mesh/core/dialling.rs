//! When a peer that did not answer is dialled again.
//!
//! Invariant: only peers with a lease have entries; the caller drops all others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::limits::{DIAL_RETRY_FIRST, DIAL_RETRY_MAX};

struct Entry {
    next: Instant,
    wait: Duration,
}

/// Peers that were dialled and have not connected yet.
#[derive(Default)]
pub(super) struct Dialling {
    entries: BTreeMap<PeerId, Entry>,
}

impl Dialling {
    /// Whether a peer may be dialled now. If so, the next attempt is delayed, twice as long each
    /// time.
    pub(super) fn take(&mut self, now: Instant, peer: PeerId) -> bool {
        let entry = self.entries.entry(peer).or_insert(Entry { next: now, wait: DIAL_RETRY_FIRST });
        if entry.next > now {
            return false;
        }
        entry.next = now + entry.wait;
        entry.wait = (entry.wait * 2).min(DIAL_RETRY_MAX);
        true
    }

    /// When the first of these peers may be dialled again, after `now`.
    pub(super) fn next(
        &self,
        now: Instant,
        peers: impl Iterator<Item = PeerId>,
    ) -> Option<Instant> {
        let entries = peers.filter_map(|peer| self.entries.get(&peer));
        entries.map(|entry| entry.next).filter(|next| *next > now).min()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Call when a peer has connected.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.entries.remove(&peer);
    }

    pub(super) fn retain(&mut self, is_known: impl Fn(PeerId) -> bool) {
        self.entries.retain(|peer, _| is_known(*peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_answer_is_dialled_ever_more_seldom() {
        let start = Instant::now();
        let (peer, other) = (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]));
        let mut dialling = Dialling::default();
        let mut dialled = Vec::new();
        for half in 0..64 {
            if dialling.take(start + DIAL_RETRY_FIRST * half, peer) {
                dialled.push(half);
            }
        }
        assert_eq!(dialled, [0, 1, 3, 7, 15, 31, 63]);
        let now = start + DIAL_RETRY_FIRST * 63;
        let next = dialling.next(now, [peer, other].into_iter());
        assert_eq!(next, Some(now + DIAL_RETRY_FIRST * 64));
        dialling.forget(peer);
        assert!(dialling.take(now, peer), "it was connected meanwhile");
        dialling.retain(|_| false);
        assert_eq!(dialling.next(now, [peer].into_iter()), None);
    }
}
