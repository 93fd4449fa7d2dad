//! In which order a peer's addresses are dialled: QUIC first, what else it has a moment
//! later or as soon as that fails. Pure: the time is an argument.
//!
//! Invariant: an address that nodes do not dial (WebRTC) is never handed out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::{Address, Carrier, PeerId};

/// Dials of which a part is still to come.
pub(crate) struct Dials {
    waiting: BTreeMap<PeerId, Waiting>,
    head_start: Duration,
    capacity: usize,
}

struct Waiting {
    due: Instant,
    /// The next to dial is the last.
    waves: Vec<Vec<Address>>,
}

impl Dials {
    /// Each wave of addresses gets `head_start` before the next; at most `capacity` peers
    /// wait for a further wave, and those beyond get all their addresses at once.
    pub(crate) const fn new(head_start: Duration, capacity: usize) -> Self {
        Self { waiting: BTreeMap::new(), head_start, capacity }
    }

    /// What to dial now; the rest is kept for later. Nothing if the peer is being dialled.
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        peer: PeerId,
        addresses: Vec<Address>,
    ) -> Vec<Address> {
        if self.waiting.contains_key(&peer) {
            return Vec::new();
        }
        let mut waves = waves(addresses);
        if self.waiting.len() >= self.capacity {
            waves.reverse();
            return waves.concat();
        }
        let first = waves.pop().unwrap_or_default();
        self.keep(now, peer, waves);
        first
    }

    /// A dial failed: the peer's next addresses, at once.
    pub(crate) fn failed(&mut self, now: Instant, peer: PeerId) -> Vec<Address> {
        let Some(mut waiting) = self.waiting.remove(&peer) else { return Vec::new() };
        let next = waiting.waves.pop().unwrap_or_default();
        self.keep(now, peer, waiting.waves);
        next
    }

    /// Nothing more is to be dialled of a peer.
    pub(crate) fn forget(&mut self, peer: PeerId) {
        self.waiting.remove(&peer);
    }

    /// Whose head start is over, with the addresses to try beside those under way.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<(PeerId, Vec<Address>)> {
        let due = self.waiting.iter().filter(|(_, waiting)| waiting.due <= now);
        let due: Vec<PeerId> = due.map(|(peer, _)| *peer).collect();
        due.into_iter().map(|peer| (peer, self.failed(now, peer))).collect()
    }

    fn keep(&mut self, now: Instant, peer: PeerId, waves: Vec<Vec<Address>>) {
        if !waves.is_empty() {
            self.waiting.insert(peer, Waiting { due: now + self.head_start, waves });
        }
    }
}

/// Addresses by what carries them, the least wanted first.
fn waves(addresses: Vec<Address>) -> Vec<Vec<Address>> {
    let mut waves: BTreeMap<Carrier, Vec<Address>> = BTreeMap::new();
    for address in addresses {
        let carrier = address.carrier();
        if carrier != Carrier::WebRtc {
            waves.entry(carrier).or_default().push(address);
        }
    }
    waves.into_values().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_START: Duration = Duration::from_millis(500);

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn everything() -> (Vec<Address>, [Address; 4]) {
        let quic = address("/ip4/10.0.0.1/udp/1/quic-v1");
        let other_quic = address("/ip4/10.0.0.2/udp/1/quic-v1");
        let tcp = address("/ip4/10.0.0.1/tcp/1");
        let ws = address("/ip4/10.0.0.1/tcp/2/ws");
        let webrtc = address("/ip4/10.0.0.1/udp/2/webrtc-direct");
        let all = [&ws, &tcp, &webrtc, &quic, &other_quic].map(Clone::clone).to_vec();
        (all, [quic, other_quic, tcp, ws])
    }

    #[test]
    fn quic_has_a_head_start_and_webrtc_is_never_dialled() {
        let (start, peer) = (Instant::now(), PeerId::from_seed([1; 32]));
        let (all, [quic, other_quic, tcp, ws]) = everything();
        let mut dials = Dials::new(HEAD_START, 8);
        assert_eq!(dials.begin(start, peer, all.clone()), [quic.clone(), other_quic]);
        assert!(dials.begin(start, peer, all.clone()).is_empty(), "under way");
        assert!(dials.due(start + HEAD_START / 2).is_empty());
        assert_eq!(dials.due(start + HEAD_START), [(peer, vec![tcp.clone()])]);
        assert!(dials.due(start + HEAD_START).is_empty());
        assert_eq!(dials.due(start + HEAD_START * 2), [(peer, vec![ws.clone()])]);
        assert!(dials.due(start + HEAD_START * 9).is_empty());

        // A refused packet says at once what silence says in the end.
        assert_eq!(dials.begin(start, peer, all.clone()).len(), 2);
        assert_eq!(dials.failed(start, peer), [tcp]);
        assert_eq!(dials.failed(start, peer), [ws]);
        assert!(dials.failed(start, peer).is_empty());

        assert_eq!(dials.begin(start, peer, all).len(), 2);
        dials.forget(peer);
        assert!(dials.due(start + HEAD_START * 9).is_empty(), "connected");
        let only = vec![address("/ip4/10.0.0.1/udp/2/webrtc-direct")];
        assert!(dials.begin(start, peer, only).is_empty());
    }

    #[test]
    fn beyond_the_bound_everything_is_dialled_at_once() {
        let start = Instant::now();
        let mut dials = Dials::new(HEAD_START, 1);
        let (all, [quic, other_quic, tcp, ws]) = everything();
        assert_eq!(dials.begin(start, PeerId::from_seed([1; 32]), all.clone()).len(), 2);
        let second = dials.begin(start, PeerId::from_seed([2; 32]), all);
        assert_eq!(second, [quic, other_quic, tcp, ws]);
    }
}
