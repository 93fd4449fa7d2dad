//! The order in which a peer's addresses are dialled: QUIC first, the others a moment
//! later or as soon as QUIC fails. Pure: the time is an argument.
//!
//! Invariant: addresses that nodes do not dial (WebRTC) are never returned.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::{Address, PeerId, Transport};

/// Peers that have addresses left to dial.
pub(crate) struct Dials {
    waiting: BTreeMap<PeerId, Waiting>,
    head_start: Duration,
    capacity: usize,
}

struct Waiting {
    due: Instant,
    /// The waves left to dial, in reverse order.
    waves: Vec<Vec<Address>>,
}

impl Dials {
    /// Each wave of addresses gets a head start of `head_start` over the next. At most
    /// `capacity` peers wait for a further wave; others are dialled at all addresses at once.
    pub(crate) const fn new(head_start: Duration, capacity: usize) -> Self {
        Self { waiting: BTreeMap::new(), head_start, capacity }
    }

    /// Starts dialling a peer: returns the first wave and keeps the others. Empty if the peer is
    /// being dialled already.
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

    /// A dial failed: returns the peer's next wave.
    pub(crate) fn failed(&mut self, now: Instant, peer: PeerId) -> Vec<Address> {
        let Some(mut waiting) = self.waiting.remove(&peer) else { return Vec::new() };
        let next = waiting.waves.pop().unwrap_or_default();
        self.keep(now, peer, waiting.waves);
        next
    }

    /// Drops a peer's remaining waves.
    pub(crate) fn forget(&mut self, peer: PeerId) {
        self.waiting.remove(&peer);
    }

    /// Peers whose head start is over, each with its next wave, to dial beside the last one.
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

/// Groups addresses by transport, the least preferred first.
fn waves(addresses: Vec<Address>) -> Vec<Vec<Address>> {
    let mut waves: BTreeMap<Transport, Vec<Address>> = BTreeMap::new();
    for address in addresses {
        let transport = address.transport();
        if transport != Transport::WebRtc {
            waves.entry(transport).or_default().push(address);
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
        assert!(dials.begin(start, peer, all.clone()).is_empty(), "being dialled");
        assert!(dials.due(start + HEAD_START / 2).is_empty());
        assert_eq!(dials.due(start + HEAD_START), [(peer, vec![tcp.clone()])]);
        assert!(dials.due(start + HEAD_START).is_empty());
        assert_eq!(dials.due(start + HEAD_START * 2), [(peer, vec![ws.clone()])]);
        assert!(dials.due(start + HEAD_START * 9).is_empty());

        // After a failed dial the next wave comes at once.
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
