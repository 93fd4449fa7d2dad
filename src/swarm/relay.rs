//! Relays: the limits of what this node relays for others, and the reservations that it keeps
//! at other relays. The decisions are pure: the time is an argument.
//!
//! Invariants: this node has reservations at no more than [`RELAYS_MAX`] relays. A relay that
//! refused or went away is asked again only after a wait that doubles each time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::Multiaddr;
use libp2p::relay::Config;

use crate::options::{
    CIRCUIT_BYTES_MAX, CIRCUIT_TIME_MAX, CIRCUITS_MAX, CIRCUITS_PER_PEER_MAX,
    CIRCUITS_PER_WINDOW_MAX, RELAY_RETRY_FIRST, RELAY_RETRY_MAX, RELAY_SETTLED, RELAY_WINDOW,
    RELAYS_MAX, RELAYS_REMEMBERED_MAX, RESERVATION_TIME, RESERVATIONS_MAX,
    RESERVATIONS_PER_PEER_MAX, RESERVATIONS_PER_WINDOW_MAX,
};
use crate::{PeerId, convert};

/// What a node does with relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RelayMode {
    /// Neither offers a relay nor uses any, not even to dial.
    #[default]
    Off,
    /// Uses other relays, never offers one. Keeps reservations unless it is known to be public.
    Client,
    /// Offers a relay whatever its peers report; its listen addresses count as reachable.
    Server,
    /// Offers a relay while its peers report that they can dial it; keeps reservations while they
    /// report that they cannot.
    Auto,
}

impl RelayMode {
    pub(crate) const fn may_serve(self) -> bool {
        matches!(self, Self::Server | Self::Auto)
    }
}

/// The limits of this node as a relay.
pub(crate) fn limits() -> Config {
    Config {
        max_reservations: RESERVATIONS_MAX,
        // libp2p allows one more than these two limits say.
        max_reservations_per_peer: RESERVATIONS_PER_PEER_MAX - 1,
        max_circuits_per_peer: CIRCUITS_PER_PEER_MAX - 1,
        reservation_duration: RESERVATION_TIME,
        max_circuits: CIRCUITS_MAX,
        max_circuit_duration: CIRCUIT_TIME_MAX,
        max_circuit_bytes: CIRCUIT_BYTES_MAX,
        reservation_rate_limiters: vec![limiter(RESERVATIONS_PER_WINDOW_MAX)],
        circuit_src_rate_limiters: vec![limiter(CIRCUITS_PER_WINDOW_MAX)],
    }
}

type Limiter = Box<dyn libp2p::relay::RateLimiter>;

fn limiter(total: u32) -> Limiter {
    let start = Instant::now();
    let mut window = Window::new(start, total);
    let admit = move |peer: libp2p::PeerId, _: &Multiaddr, _: _| {
        window.admit(Instant::now(), convert::peer(peer))
    };
    Box::new(admit)
}

/// Limits requests per window: `total` of them, and a quarter of that from one peer.
struct Window {
    ends: Instant,
    total: u32,
    left: u32,
    by_peer: BTreeMap<PeerId, u32>,
}

impl Window {
    fn new(now: Instant, total: u32) -> Self {
        Self { ends: now + RELAY_WINDOW, total, left: total, by_peer: BTreeMap::new() }
    }

    fn admit(&mut self, now: Instant, peer: PeerId) -> bool {
        if now >= self.ends {
            *self = Self::new(now, self.total);
        }
        let own = self.by_peer.get(&peer).copied().unwrap_or(0);
        if self.left == 0 || own >= (self.total / 4).max(1) {
            return false;
        }
        self.left -= 1;
        self.by_peer.insert(peer, own + 1);
        true
    }
}

/// A reservation at a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reservation {
    Asked,
    Held {
        since: Instant,
    },
    /// Released, but not closed yet.
    Leaving,
}

struct Failure {
    retry: Instant,
    wait: Duration,
}

/// What to do about a reservation at a relay.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RelayAction {
    Reserve(PeerId),
    Release(PeerId),
}

/// The reservations that this node keeps.
#[derive(Default)]
pub(crate) struct Reservations {
    reservations: BTreeMap<PeerId, Reservation>,
    failures: BTreeMap<PeerId, Failure>,
}

impl Reservations {
    /// What to do now. `wanted` says whether this node needs relays; `relays` are the connected
    /// peers that offer one.
    pub(crate) fn plan(
        &mut self,
        now: Instant,
        wanted: bool,
        relays: impl IntoIterator<Item = PeerId>,
    ) -> Vec<RelayAction> {
        let mut actions = Vec::new();
        if !wanted {
            for (peer, reservation) in &mut self.reservations {
                // Not while it is requested or may be about to be renewed: libp2p treats an
                // answer about a reservation that it no longer knows as an internal error.
                if let Reservation::Held { since } = *reservation
                    && now.saturating_duration_since(since) < RELAY_SETTLED
                {
                    *reservation = Reservation::Leaving;
                    actions.push(RelayAction::Release(*peer));
                }
            }
            return actions;
        }
        for peer in relays {
            if self.reservations.len() >= RELAYS_MAX {
                break;
            }
            let waits = self.failures.get(&peer).is_some_and(|failure| failure.retry > now);
            if !waits && !self.reservations.contains_key(&peer) {
                self.reservations.insert(peer, Reservation::Asked);
                actions.push(RelayAction::Reserve(peer));
            }
        }
        actions
    }

    /// A relay has granted or renewed a reservation.
    pub(crate) fn granted(&mut self, now: Instant, relay: PeerId) {
        self.failures.remove(&relay);
        if let Some(reservation) = self.reservations.get_mut(&relay)
            && *reservation != Reservation::Leaving
        {
            *reservation = Reservation::Held { since: now };
        }
    }

    /// A reservation has ended or was refused.
    pub(crate) fn lost(&mut self, now: Instant, relay: PeerId) {
        if self.reservations.remove(&relay) == Some(Reservation::Leaving) {
            return;
        }
        if self.failures.len() >= RELAYS_REMEMBERED_MAX && !self.failures.contains_key(&relay) {
            self.failures.retain(|_, failure| failure.retry > now);
            if self.failures.len() >= RELAYS_REMEMBERED_MAX {
                self.failures.clear();
            }
        }
        let failure =
            self.failures.entry(relay).or_insert(Failure { retry: now, wait: RELAY_RETRY_FIRST });
        failure.retry = now + failure.wait;
        failure.wait = (failure.wait * 2).min(RELAY_RETRY_MAX);
    }

    /// The relays at which this node has a reservation now.
    pub(crate) fn relays(&self) -> Vec<PeerId> {
        let held = self
            .reservations
            .iter()
            .filter(|(_, reservation)| matches!(reservation, Reservation::Held { .. }));
        held.map(|(peer, _)| *peer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::from_seed([number; 32])
    }

    #[test]
    fn a_few_reservations_are_kept_and_a_refusal_is_not_retried_at_once() {
        let start = Instant::now();
        let all: Vec<PeerId> = (0..RELAYS_MAX as u8 + 2).map(peer).collect();
        let mut reservations = Reservations::default();
        assert!(reservations.plan(start, false, all.clone()).is_empty());
        let actions = reservations.plan(start, true, all.clone());
        assert_eq!(actions.len(), RELAYS_MAX);
        assert!(reservations.plan(start, true, all.clone()).is_empty(), "already requested");
        assert!(reservations.relays().is_empty());
        for peer in &all[..RELAYS_MAX] {
            reservations.granted(start, *peer);
        }
        assert_eq!(reservations.relays().len(), RELAYS_MAX);

        // The first goes away: another one is asked at once, the first one after a wait.
        reservations.lost(start, all[0]);
        assert_eq!(
            reservations.plan(start, true, all.clone()),
            [RelayAction::Reserve(all[RELAYS_MAX])]
        );
        reservations.lost(start, all[RELAYS_MAX]);
        let only = [all[0]];
        assert!(reservations.plan(start, true, only).is_empty());
        let later = start + RELAY_RETRY_FIRST;
        assert_eq!(reservations.plan(later, true, only), [RelayAction::Reserve(all[0])]);
        reservations.lost(later, all[0]);
        assert!(
            reservations.plan(later + RELAY_RETRY_FIRST, true, only).is_empty(),
            "twice as long"
        );
        assert_eq!(
            reservations.plan(later + RELAY_RETRY_FIRST * 2, true, only),
            [RelayAction::Reserve(all[0])]
        );
    }

    #[test]
    fn reservations_are_released_when_not_needed_but_not_while_requested_or_renewed() {
        let start = Instant::now();
        let mut reservations = Reservations::default();
        reservations.plan(start, true, [peer(1), peer(2)]);
        reservations.granted(start, peer(1));
        assert_eq!(reservations.plan(start, false, []), [RelayAction::Release(peer(1))]);
        assert!(reservations.plan(start, false, []).is_empty(), "the other is still requested");
        reservations.granted(start, peer(1));
        assert!(reservations.relays().is_empty(), "it was released");
        reservations.lost(start, peer(1));
        assert!(reservations.relays().is_empty());
        reservations.granted(start, peer(2));
        assert!(reservations.plan(start + RELAY_SETTLED, false, []).is_empty());
        reservations.granted(start + RELAY_SETTLED, peer(2));
        assert_eq!(
            reservations.plan(start + RELAY_SETTLED, false, []),
            [RelayAction::Release(peer(2))]
        );
        reservations.lost(start, peer(2));
        // A release does not count as a failure.
        assert_eq!(reservations.plan(start, true, [peer(1)]), [RelayAction::Reserve(peer(1))]);
    }

    #[test]
    fn requests_are_limited_in_total_and_per_peer() {
        let start = Instant::now();
        let mut window = Window::new(start, 8);
        assert_eq!((0..9).filter(|_| window.admit(start, peer(1))).count(), 2);
        let others = (2..20).filter(|number| window.admit(start, peer(*number))).count();
        assert_eq!(others, 6);
        assert!(window.admit(start + RELAY_WINDOW, peer(1)));
    }
}
