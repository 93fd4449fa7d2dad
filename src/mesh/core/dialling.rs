//! When this node dials whom: those that it has lost, and others while it has few connections. What is known
//! of each, and the pauses between two dials, are `known`'s.
//!
//! Invariant: two rounds of dials are at least [`DIAL_SETTLE`] apart.

use std::time::Instant;

use doppler_ids::PeerId;

use super::limits::{DIAL_SETTLE, DIAL_TARGET};
use super::{Action, Core};

impl Core {
    /// Connections to members that this node opens in advance.
    pub(super) fn room(&self) -> usize {
        DIAL_TARGET.saturating_sub(self.listeners)
    }

    /// Peers may have to be dialled: looks as soon as the last round allows.
    pub(super) fn dial_soon(&mut self, now: Instant) {
        let earliest = self.dialled_at.map_or(now, |at| now.max(at + DIAL_SETTLE));
        self.dial_at = self.dial_at.min(earliest);
    }

    /// Dials known peers whose turn it is, up to a number of connections ahead of need.
    pub(super) fn dial_known(&mut self, now: Instant, out: &mut Vec<Action>) {
        let room = self.room();
        self.dialled_at = Some(now);
        if room == 0 && !self.known.has_lost(now) {
            self.dial_at = self.upkeep.max(now + DIAL_SETTLE);
            return;
        }
        let Self { known, reputation, .. } = self;
        let (due, next) = known.round(now, room, |peer| !reputation.is_banned(now, peer));
        out.extend(due.into_iter().map(|(peer, addresses)| Action::Dial { peer, addresses }));
        self.dial_at = next.unwrap_or(self.upkeep).max(now + DIAL_SETTLE);
    }

    /// Dials those of `wanted` that are due. Each dial delays the next one.
    pub(super) fn dial(&mut self, now: Instant, wanted: Vec<PeerId>, out: &mut Vec<Action>) {
        for peer in wanted {
            if self.contacts.contains_key(&peer) || self.reputation.is_banned(now, peer) {
                continue;
            }
            let addresses = self.known.take(now, peer);
            out.extend(addresses.map(|addresses| Action::Dial { peer, addresses }));
        }
    }
}
