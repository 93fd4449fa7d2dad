//! Who is there: doubts, who dials for whom to find out, goodbyes.
//!
//! A peer is doubted by whoever loses its connection or waits in vain for its next word. The doubt
//! is gossip, so it reaches the peer on every way that is left, and so does its answer reach
//! everybody. Two others, the same for all that hear the doubt, dial the peer if they are not
//! connected to it: the indirect probe. Only the peer's own signed word ends a doubt.
//!
//! Invariants: nobody is called dead on the word of others alone, because whoever lives has
//! [`super::limits::DOUBT_FOR`] to speak, and answers every doubt in that time; a node that has lost all its peers, or slept, doubts
//! nobody; after its goodbye a node says nothing.

use std::time::Instant;

use doppler_ids::PeerId;
use tracing::debug;

use super::gossip::Due;
use super::limits::{BEAT_GRACE, DOUBT_AFTER, REFUTE_EVERY, WITNESSES};
use super::{Action, Core, Sight};
use crate::wire::{Envelope, Stamp};

impl Core {
    /// Another node has lost a peer. If the peer is this node, it speaks.
    pub(super) fn on_doubt(
        &mut self,
        now: Instant,
        author: PeerId,
        peer: &[u8],
        out: &mut Vec<Action>,
    ) -> bool {
        let Ok(peer) = PeerId::from_bytes(peer) else {
            self.counts.bad_messages += 1;
            return false;
        };
        if peer == self.config.own {
            self.refute(now);
            return true;
        }
        // Its answer may overtake the doubt; whoever has just spoken is not asked again.
        let has_spoken = self.membership.heard(peer).is_some_and(|at| now < at + DOUBT_AFTER);
        if !has_spoken && self.membership.knows(peer) && self.absence.doubt(now, peer) {
            self.witness(now, author, peer, out);
        }
        true
    }

    /// This node is doubted, so it speaks: at once, even in a pause, or if it has just done so, as
    /// soon as it may again. Somebody may have heard its last answer before this doubt.
    fn refute(&mut self, now: Instant) {
        let at = self.refuted.map_or(now, |last| now.max(last + REFUTE_EVERY));
        if self.refuted.is_none_or(|last| last <= now) {
            self.refuted = Some(at);
            self.schedule.beat_by(at);
            // Then what it holds, for those that have dropped it.
            self.schedule.change(at, Due::Holdings);
        }
    }

    /// Dials a doubted peer if this node is among those that do so for the others: the best placed
    /// of those that it knows, without the one that doubts and dials anyway.
    fn witness(&mut self, now: Instant, author: PeerId, peer: PeerId, out: &mut Vec<Action>) {
        let own = rank(self.config.own, peer);
        let others = self.membership.peers();
        let better =
            others.filter(|other| *other != peer && *other != author && rank(*other, peer) > own);
        if better.take(WITNESSES).count() < WITNESSES {
            self.known.call(now, peer);
            self.dial(now, vec![peer], out);
        }
    }

    /// Doubts the peers that are lost or overdue.
    pub(super) fn look_for_the_silent(&mut self, now: Instant, out: &mut Vec<Action>) {
        // This node itself slept, or was stopped: what others said meanwhile may be on its way.
        if now > self.upkeep + BEAT_GRACE {
            self.awake = now;
        }
        // A node that has lost all its peers is itself the lost one.
        if self.contacts.is_empty() || self.has_stopped {
            self.awake = now;
            return;
        }
        let overdue = self.membership.overdue(now, self.awake, BEAT_GRACE);
        for peer in self.absence.take_doubts(now, overdue) {
            out.push(Action::Publish(Envelope::Doubt(peer.to_bytes()).encode()));
        }
    }

    /// A peer stops in good order: nothing that it held counts from now on.
    pub(super) fn on_goodbye(
        &mut self,
        now: Instant,
        author: PeerId,
        stamp: Stamp,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        if !self.membership.part(now, author, stamp) {
            return;
        }
        debug!(%author, "said goodbye");
        self.absence.spoke(author);
        self.known.failed(author, "it has stopped".to_owned(), false);
        self.settle(now, true, sight, out);
        out.push(Action::Changed);
    }

    /// This node stops.
    pub(super) fn on_stop(&mut self, out: &mut Vec<Action>) {
        if !self.has_stopped {
            self.has_stopped = true;
            out.push(Action::Publish(Envelope::Goodbye(self.numbers.next()).encode()));
        }
    }

    /// Whether a peer's connection was lost, or its word is overdue, and it has not spoken since.
    pub(super) fn is_missing(&self, now: Instant, peer: PeerId) -> bool {
        let promised = self.membership.due_at(peer, self.awake).map(|at| at + BEAT_GRACE);
        let silent_at = promised.or_else(|| {
            // One that promises nothing speaks in every round.
            self.membership
                .heard(peer)
                .map(|heard| heard + self.config.timing.announce_every * 3 / 2)
        });
        self.absence.is_missing(now, peer, silent_at.unwrap_or(now))
    }
}

/// A peer's place among those that dial a doubted one for the others; higher is better.
fn rank(peer: PeerId, doubted: PeerId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(peer.as_bytes());
    hasher.update(doubted.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}
