//! Which peer serves a range, and how a range is split over peers. Pure.
//!
//! Invariant: a peer's bytes in flight are those of the requests begun and not
//! yet ended; `begin` and `end` come in pairs.

use std::collections::BTreeMap;
use std::time::Duration;

use doppler_swarm::PeerId;

use super::options::{PEERS_REMEMBERED_MAX, PIECE_BYTES_MIN, REQUESTS_PER_PEER_MAX};
use crate::store::ByteRange;
use crate::store::verified::{GROUP_BYTES, SERVE_BYTES_MAX};

/// Weight of the newest sample in a peer's rate.
const EWMA: f64 = 0.3;
/// Bytes per second assumed of a peer that has not been measured while nobody has:
/// a fast local link, so that newcomers are tried.
const RATE_UNKNOWN: f64 = 100e6;
/// Transfers shorter than this measure the round trip, not the rate.
const SAMPLE_BYTES_MIN: u64 = 64 * 1024;

#[derive(Default)]
struct Load {
    in_flight: u64,
    requests: u32,
    delivered: u64,
    rate: Option<f64>,
}

/// A request that began: what `end` needs to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    pub(super) peer: PeerId,
    pub(super) len: u64,
    delivered_before: u64,
}

/// Peers' loads and measured rates.
#[derive(Default)]
pub(super) struct Picker {
    loads: BTreeMap<PeerId, Load>,
}

impl Picker {
    /// The candidate expected to be done first: bytes in flight and asked for, over its
    /// rate, worsened by a low score. `salt` (from the range) orders equals, so
    /// that ranges spread over peers of which nothing is known. `None` if every candidate is full.
    pub(super) fn pick(
        &self,
        candidates: impl IntoIterator<Item = (PeerId, f64)>,
        len: u64,
        salt: u64,
    ) -> Option<PeerId> {
        let assumed = self.typical_rate();
        let mut best: Option<(f64, u64, PeerId)> = None;
        for (peer, score) in candidates {
            let load = self.loads.get(&peer);
            if load.is_some_and(|load| load.requests >= REQUESTS_PER_PEER_MAX) {
                continue;
            }
            let in_flight = load.map_or(0, |load| load.in_flight);
            let rate = load.and_then(|load| load.rate).unwrap_or(assumed);
            let seconds = (in_flight + len) as f64 / (rate * score.max(0.01));
            let tie = tie_break(peer, salt);
            let better = best.is_none_or(|(least, other, _)| {
                // Within a tenth is equal: small differences would pin all load to one peer.
                if (seconds - least).abs() <= 0.1 * least { tie < other } else { seconds < least }
            });
            if better {
                best = Some((seconds, tie, peer));
            }
        }
        best.map(|(_, _, peer)| peer)
    }

    pub(super) fn begin(&mut self, peer: PeerId, len: u64) -> Begun {
        if self.loads.len() >= PEERS_REMEMBERED_MAX {
            self.loads.retain(|_, load| load.requests > 0);
        }
        let load = self.loads.entry(peer).or_default();
        load.in_flight += len;
        load.requests += 1;
        Begun { peer, len, delivered_before: load.delivered }
    }

    /// A request ended, having delivered `bytes` in `elapsed` (0 if it failed).
    pub(super) fn end(&mut self, begun: Begun, bytes: u64, elapsed: Duration) {
        let Some(load) = self.loads.get_mut(&begun.peer) else { return };
        load.in_flight = load.in_flight.saturating_sub(begun.len);
        load.requests = load.requests.saturating_sub(1);
        load.delivered += bytes;
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        // All that the peer delivered meanwhile: its rate, not one request's share of it.
        let delivered = load.delivered - begun.delivered_before;
        let sample = delivered as f64 / elapsed.as_secs_f64().max(1e-6);
        load.rate = Some(load.rate.map_or(sample, |rate| rate + EWMA * (sample - rate)));
    }

    /// A peer's measured rate, bytes per second.
    pub(super) fn rate(&self, peer: PeerId) -> Option<f64> {
        self.loads.get(&peer).and_then(|load| load.rate)
    }

    fn typical_rate(&self) -> f64 {
        let rates: Vec<f64> = self.loads.values().filter_map(|load| load.rate).collect();
        if rates.is_empty() { RATE_UNKNOWN } else { rates.iter().sum::<f64>() / rates.len() as f64 }
    }
}

/// A number that orders peers differently for every salt.
fn tie_break(peer: PeerId, salt: u64) -> u64 {
    let mut bytes = peer.to_bytes();
    bytes.extend_from_slice(&salt.to_le_bytes());
    let hash = blake3::hash(&bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Cuts a range into adjacent pieces of whole groups for `holders` peers: none
/// longer than a wire request may be, none so short that a round trip dominates.
/// Every piece but the first starts on a group.
pub(super) fn split(range: ByteRange, holders: usize) -> Vec<ByteRange> {
    let share = range.len().div_ceil(holders.max(1) as u64);
    let piece = share.max(PIECE_BYTES_MIN).next_multiple_of(GROUP_BYTES);
    let piece = piece.min(SERVE_BYTES_MAX);
    let mut pieces = Vec::new();
    let mut start = range.start();
    while start < range.end() {
        // Ends on a group, so that no group is sent twice.
        let end = ((start / GROUP_BYTES * GROUP_BYTES).saturating_add(piece)).min(range.end());
        pieces.extend(ByteRange::new(start, end));
        start = end;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn peer(byte: u8) -> PeerId {
        PeerId::from_seed([byte; 32])
    }

    #[test]
    fn unknown_peers_share_the_ranges() {
        let picker = Picker::default();
        let candidates: Vec<_> = (0..3).map(|i| (peer(i), 0.5)).collect();
        let mut count = BTreeMap::new();
        for salt in 0..300 {
            *count.entry(picker.pick(candidates.clone(), 1000, salt).unwrap()).or_insert(0) += 1;
        }
        assert!(count.len() == 3 && count.values().all(|n| *n > 60), "{count:?}");
        assert_eq!(picker.pick([], 1000, 0), None);
    }

    #[test]
    fn faster_idler_and_better_behaved_peers_are_preferred() {
        let mut picker = Picker::default();
        let both = [(peer(0), 0.5), (peer(1), 0.5)];
        for (index, seconds) in [(0, 1.0), (1, 4.0)] {
            let begun = picker.begin(peer(index), 1 << 20);
            picker.end(begun, 1 << 20, Duration::from_secs_f64(seconds));
        }
        assert!(picker.rate(peer(0)) > picker.rate(peer(1)));
        assert_eq!(picker.pick(both, 1 << 20, 1), Some(peer(0)));
        // Four times as fast, but with eight ranges before this one.
        let begun: Vec<_> = (0..8).map(|_| picker.begin(peer(0), 1 << 20)).collect();
        assert_eq!(picker.pick(both, 1 << 20, 1), Some(peer(1)));
        for one in begun {
            picker.end(one, 0, Duration::ZERO);
        }
        assert_eq!(picker.pick(both, 1 << 20, 1), Some(peer(0)));
        let distrusted = [(peer(0), 0.05), (peer(1), 0.5)];
        assert_eq!(picker.pick(distrusted, 1 << 20, 1), Some(peer(1)));
        for _ in 0..REQUESTS_PER_PEER_MAX {
            picker.begin(peer(0), 1);
        }
        assert_eq!(picker.pick([(peer(0), 1.0)], 1, 1), None, "full");
    }

    #[test]
    fn pieces_cover_the_range_exactly_and_meet_on_groups() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..2000 {
            let start = rng.random_range(0..40 << 20);
            let len = rng.random_range(1..24 << 20);
            let holders = rng.random_range(0..9);
            let range = ByteRange::at(start, len).unwrap();
            let pieces = split(range, holders);
            assert_eq!((pieces[0].start(), pieces[pieces.len() - 1].end()), (start, start + len));
            for pair in pieces.windows(2) {
                assert_eq!(pair[0].end(), pair[1].start());
                assert_eq!(pair[1].start() % GROUP_BYTES, 0);
            }
            assert!(pieces.iter().all(|piece| piece.len() <= SERVE_BYTES_MAX));
        }
        let expert = ByteRange::new(0, 3 << 20).unwrap();
        assert_eq!((split(expert, 1).len(), split(expert, 3).len()), (1, 3));
        assert_eq!(split(expert, 100).len(), 3);
    }
}
