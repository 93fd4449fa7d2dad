//! What is known about the connection to each peer: bytes in flight, its measured rate, when it was
//! last heard, and how late answers usually are. Pure: the time is an argument.
//!
//! Invariant: a peer's bytes in flight are those of requests that have begun and not ended. `begin`
//! and `end` come in pairs.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::limits::{
    HEDGE_AFTER_MIN, HEDGE_UNKNOWN, LATENESS_SAMPLES, PEERS_REMEMBERED_MAX, SILENT_AFTER,
    SLOW_AFTER,
};

/// Weight of the newest sample in a peer's rate.
const EWMA: f64 = 0.3;
/// The rate, in bytes per second, assumed for a peer while no peer has been measured: that of a
/// fast local link, so that newcomers are tried.
const RATE_UNKNOWN: f64 = 100e6;
/// Transfers shorter than this measure the round trip, not the rate.
const SAMPLE_BYTES_MIN: u64 = 64 * 1024;
/// The assumed 95th percentile of an answer's time, as a multiple of the expected time, until
/// enough answers have come; and the bounds of the measured one.
const LATENESS_UNKNOWN: f64 = 3.0;
const LATENESS_RANGE: (f64, f64) = (1.5, 8.0);

#[derive(Default)]
struct Link {
    in_flight: u64,
    requests: u32,
    delivered: u64,
    rate: Option<f64>,
    /// Since when it has owed an answer, and when a byte of one last came.
    busy_since: Option<Instant>,
    heard: Option<Instant>,
    /// When the whole of an answer last arrived.
    delivered_at: Option<Instant>,
    /// Whether it was silent and has not been heard since.
    suspect: bool,
}

/// What `end` needs to know about a request that began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    pub(super) peer: PeerId,
    pub(super) len: u64,
    pub(super) at: Instant,
    /// How long it should take. `None` for a peer that has not been measured.
    expected: Option<Duration>,
    delivered_before: u64,
}

impl Begun {
    /// When it should be done, if that is known.
    pub(super) fn due(&self) -> Option<Instant> {
        self.expected.map(|expected| self.at + expected)
    }
}

/// Peers' loads and measured rates.
#[derive(Default)]
pub(super) struct Links {
    links: BTreeMap<PeerId, Link>,
    /// The times of the last answers, divided by the expected times.
    lateness: VecDeque<f64>,
    /// The 95th percentile of those, once there are enough.
    p95: Option<f64>,
}

impl Links {
    pub(super) fn begin(&mut self, now: Instant, peer: PeerId, len: u64) -> Begun {
        if self.links.len() >= PEERS_REMEMBERED_MAX && !self.links.contains_key(&peer) {
            self.links.retain(|_, link| link.requests > 0);
        }
        let link = self.links.entry(peer).or_default();
        if link.requests == 0 {
            link.busy_since = Some(now);
        }
        link.in_flight += len;
        link.requests += 1;
        let seconds = link.rate.map(|rate| link.in_flight as f64 / rate);
        // A rate measured on few bytes may be far off, but no request takes a day.
        let expected = seconds.map(|seconds| Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0)));
        Begun { peer, len, at: now, expected, delivered_before: link.delivered }
    }

    /// Peers known, and the requests under way to the one that has most.
    pub(super) fn fill(&self) -> (usize, usize) {
        let most = self.links.values().map(|link| link.requests as usize).max();
        (self.links.len(), most.unwrap_or(0))
    }

    /// Call when bytes of an answer come.
    pub(super) fn heard(&mut self, now: Instant, peer: PeerId) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.heard = Some(now);
            link.suspect = false;
        }
    }

    /// When bytes of an answer last arrived from a peer.
    pub(super) fn heard_at(&self, peer: PeerId) -> Option<Instant> {
        self.links.get(&peer).and_then(|link| link.heard)
    }

    /// When the whole of an answer last arrived from a peer.
    pub(super) fn delivered_at(&self, peer: PeerId) -> Option<Instant> {
        self.links.get(&peer).and_then(|link| link.delivered_at)
    }

    /// Call when a peer has a new connection. Forgets what was measured on the old one. Requests in
    /// flight stay counted.
    pub(super) fn renew(&mut self, peer: PeerId) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.rate = None;
            link.heard = None;
            link.suspect = false;
        }
    }

    /// Call when others were faster while the peer was silent. It then gets one request at a time
    /// until it is heard.
    pub(super) fn suspect(&mut self, peer: PeerId) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.suspect = true;
        }
    }

    pub(super) fn is_suspect(&self, peer: PeerId) -> bool {
        self.links.get(&peer).is_some_and(|link| link.suspect)
    }

    /// Call when a request ended, having delivered `bytes` (0 if it failed or was cancelled).
    pub(super) fn end(&mut self, now: Instant, begun: Begun, bytes: u64) {
        let Some(link) = self.links.get_mut(&begun.peer) else { return };
        link.in_flight = link.in_flight.saturating_sub(begun.len);
        link.requests = link.requests.saturating_sub(1);
        link.delivered += bytes;
        if bytes == 0 {
            return;
        }
        (link.heard, link.delivered_at) = (Some(now), Some(now));
        link.suspect = false;
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        let elapsed = now.saturating_duration_since(begun.at).as_secs_f64().max(1e-6);
        // Everything that the peer delivered meanwhile, to measure its whole rate and not that of
        // one request.
        let delivered = link.delivered - begun.delivered_before;
        let sample = delivered as f64 / elapsed;
        link.rate = Some(link.rate.map_or(sample, |rate| rate + EWMA * (sample - rate)));
        if let Some(expected) = begun.expected {
            if self.lateness.len() >= LATENESS_SAMPLES {
                self.lateness.pop_front();
            }
            self.lateness.push_back(elapsed / expected.as_secs_f64().max(1e-6));
            self.p95 = self.measured_p95();
        }
    }

    /// The peer that has owed answers for a while and delivers the least.
    pub(super) fn slowest(&self, now: Instant) -> Option<PeerId> {
        let busy = self.links.iter().filter(|(_, link)| {
            link.requests > 0 && link.busy_since.is_some_and(|since| since + SLOW_AFTER <= now)
        });
        let rate = |link: &Link| link.rate.unwrap_or(0.0);
        busy.min_by(|a, b| rate(a.1).total_cmp(&rate(b.1))).map(|(peer, _)| *peer)
    }

    pub(super) fn requests(&self, peer: PeerId) -> u32 {
        self.links.get(&peer).map_or(0, |link| link.requests)
    }

    pub(super) fn in_flight(&self, peer: PeerId) -> u64 {
        self.links.get(&peer).map_or(0, |link| link.in_flight)
    }

    /// A peer's measured rate, bytes per second.
    pub(super) fn rate(&self, peer: PeerId) -> Option<f64> {
        self.links.get(&peer).and_then(|link| link.rate)
    }

    /// Its rate, or what others' make likely.
    pub(super) fn assumed_rate(&self, peer: PeerId) -> f64 {
        self.rate(peer).unwrap_or_else(|| {
            let rates: Vec<f64> = self.links.values().filter_map(|link| link.rate).collect();
            let count = rates.len() as f64;
            if rates.is_empty() { RATE_UNKNOWN } else { rates.iter().sum::<f64>() / count }
        })
    }

    /// Seconds until `len` more bytes would be here.
    pub(super) fn seconds(&self, peer: PeerId, len: u64) -> f64 {
        (self.in_flight(peer) + len) as f64 / self.assumed_rate(peer).max(1.0)
    }

    /// When a peer that owes answers will count as silent, unless something comes before.
    pub(super) fn silent_at(&self, peer: PeerId) -> Option<Instant> {
        let link = self.links.get(&peer).filter(|link| link.requests > 0)?;
        link.busy_since.max(link.heard).map(|since| since + SILENT_AFTER)
    }

    pub(super) fn is_silent(&self, now: Instant, peer: PeerId) -> bool {
        self.silent_at(peer).is_some_and(|at| at <= now)
    }

    /// When a request will be later than 95 of 100 are.
    pub(super) fn late_at(&self, begun: &Begun) -> Instant {
        let wait = match begun.expected {
            None => HEDGE_UNKNOWN,
            Some(expected) => {
                expected.mul_f64(self.p95.unwrap_or(LATENESS_UNKNOWN)).max(HEDGE_AFTER_MIN)
            }
        };
        begun.at + wait
    }

    fn measured_p95(&self) -> Option<f64> {
        if self.lateness.len() < LATENESS_SAMPLES / 4 {
            return None;
        }
        let mut sorted: Vec<f64> = self.lateness.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = LATENESS_RANGE;
        Some(sorted[sorted.len() * 95 / 100].clamp(least, most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn peer(byte: u8) -> PeerId {
        PeerId::from_seed([byte; 32])
    }

    #[test]
    fn a_rate_is_the_peers_not_one_requests_share() {
        let start = Instant::now();
        let mut links = Links::default();
        assert_eq!((links.rate(peer(1)), links.requests(peer(1))), (None, 0));
        let both: Vec<_> = (0..2).map(|_| links.begin(start, peer(1), MIB)).collect();
        assert_eq!((links.in_flight(peer(1)), links.requests(peer(1))), (2 * MIB, 2));
        let end = start + Duration::from_secs(1);
        for begun in both {
            links.end(end, begun, MIB);
        }
        // 1 MiB/s by the first to end, then 2 MiB/s by the second.
        let rate = links.rate(peer(1)).unwrap();
        assert!(rate > 1.25 * MIB as f64 && rate < 2.0 * MIB as f64, "{rate}");
        assert_eq!((links.in_flight(peer(1)), links.requests(peer(1))), (0, 0));
        assert_eq!(links.assumed_rate(peer(2)), rate, "no other peer is known");
    }

    #[test]
    fn another_way_to_a_peer_is_measured_afresh() {
        let start = Instant::now();
        let mut links = Links::default();
        let slow = links.begin(start, peer(1), MIB);
        links.end(start + Duration::from_secs(100), slow, MIB);
        let under_way = links.begin(start, peer(1), MIB);
        links.suspect(peer(1));
        links.renew(peer(1));
        assert_eq!((links.rate(peer(1)), links.is_suspect(peer(1))), (None, false));
        assert_eq!((links.in_flight(peer(1)), links.requests(peer(1))), (MIB, 1));
        links.end(start, under_way, 0);
        assert_eq!((links.in_flight(peer(1)), links.requests(peer(1))), (0, 0));
        links.renew(peer(2));
    }

    #[test]
    fn silence_and_lateness_are_told() {
        let start = Instant::now();
        let mut links = Links::default();
        let begun = links.begin(start, peer(1), MIB);
        assert_eq!(links.late_at(&begun), start + HEDGE_UNKNOWN);
        assert!(!links.is_silent(start + SILENT_AFTER / 2, peer(1)));
        assert!(links.is_silent(start + SILENT_AFTER, peer(1)));
        links.heard(start + SILENT_AFTER, peer(1));
        assert!(!links.is_silent(start + SILENT_AFTER, peer(1)));
        links.end(start + Duration::from_secs(1), begun, MIB);
        assert_eq!(links.silent_at(peer(1)), None, "it owes nothing");
        assert_eq!(links.slowest(start + SLOW_AFTER * 9), None);
        let owed = links.begin(start, peer(2), MIB);
        assert_eq!(links.slowest(start), None);
        assert_eq!(links.slowest(start + SLOW_AFTER), Some(peer(2)));
        links.end(start, owed, 0);
        // All answers take twice the expected time, so those that take three times are late.
        let mut now = start + Duration::from_secs(10);
        for _ in 0..2 * LATENESS_SAMPLES {
            let begun = links.begin(now, peer(1), MIB);
            links.links.get_mut(&peer(1)).unwrap().rate = Some(MIB as f64);
            let begun = Begun { expected: Some(Duration::from_secs(1)), ..begun };
            now += Duration::from_secs(2);
            links.end(now, begun, MIB);
        }
        let begun = links.begin(now, peer(1), MIB);
        let begun = Begun { expected: Some(Duration::from_secs(1)), ..begun };
        assert_eq!(links.late_at(&begun), now + Duration::from_secs(2));
    }
}
