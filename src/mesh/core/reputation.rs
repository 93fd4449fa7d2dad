//! How peers behave: a score in 0..=1, and bans. Pure: the time is an argument.
//!
//! Invariant: a peer that sent a wrong byte is banned from that moment on. It is never chosen
//! before its ban ends, and then starts with the lowest score.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::PeerId;

use super::limits::{BAN_FIRST, BAN_MAX, DENIALS_MAX, DENIED_FOR, PEERS_REMEMBERED_MAX};

/// What a peer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conduct {
    /// Sent a range that was verified.
    Delivered,
    /// Sent a byte that does not match its hash.
    WrongByte,
    /// Broke the protocol: a reply out of bounds, inconsistent lengths, or no swarm key.
    Violation,
    /// Went silent or was too slow in the middle of a transfer.
    Stalled,
    /// Its connection broke in the middle of a transfer.
    Lost,
    /// Did not have what it had said it holds.
    Denied,
    /// Said that a range is outside an object: either it or this node is wrong about the size.
    Disputed,
}

/// A newcomer's score: better than after misbehaviour, worse than after a delivery.
const SCORE_NEW: f64 = 0.5;
/// Lowest score, so that a choice between bad peers remains a choice.
const SCORE_MIN: f64 = 0.01;
/// How far one delivery moves the score towards 1.
const GAIN: f64 = 0.05;

struct Record {
    score: f64,
    offences: u32,
    banned_until: Option<Instant>,
    /// How often it denied what it had said it holds, minus deliveries; and the resulting penalty.
    denials: u32,
    disbelieved_until: Option<Instant>,
    seen: u64,
}

/// The records of all peers.
#[derive(Default)]
pub(super) struct Reputation {
    records: BTreeMap<PeerId, Record>,
    clock: u64,
}

impl Reputation {
    /// Records what a peer did. Returns the end of its ban, if that led to one.
    pub(super) fn note(&mut self, now: Instant, peer: PeerId, conduct: Conduct) -> Option<Instant> {
        self.make_room(now, peer);
        self.clock += 1;
        let record = self.records.entry(peer).or_insert(Record {
            score: SCORE_NEW,
            offences: 0,
            banned_until: None,
            denials: 0,
            disbelieved_until: None,
            seen: 0,
        });
        record.seen = self.clock;
        let score = match conduct {
            Conduct::Delivered => record.score + (1.0 - record.score) * GAIN,
            Conduct::WrongByte => SCORE_MIN,
            Conduct::Violation => record.score * 0.25,
            Conduct::Stalled => record.score * 0.6,
            Conduct::Lost => record.score * 0.8,
            Conduct::Denied | Conduct::Disputed => record.score * 0.9,
        };
        record.score = score.max(SCORE_MIN);
        match conduct {
            Conduct::Denied => record.denials += 1,
            Conduct::Delivered => record.denials = record.denials.saturating_sub(1),
            _ => {}
        }
        if record.denials >= DENIALS_MAX {
            record.denials = 0;
            record.disbelieved_until = Some(now + DENIED_FOR);
        }
        // What was under way when a ban began belongs to the offence that led to it.
        let is_banned = record.banned_until.is_some_and(|until| until > now);
        if conduct != Conduct::WrongByte || is_banned {
            return None;
        }
        let ban = BAN_FIRST.saturating_mul(1 << record.offences.min(16)).min(BAN_MAX);
        record.offences += 1;
        record.banned_until = Some(now + ban);
        record.banned_until
    }

    pub(super) fn score(&self, peer: PeerId) -> f64 {
        self.records.get(&peer).map_or(SCORE_NEW, |record| record.score)
    }

    pub(super) fn is_banned(&self, now: Instant, peer: PeerId) -> bool {
        let until = self.records.get(&peer).and_then(|record| record.banned_until);
        until.is_some_and(|until| until > now)
    }

    /// Whether a peer should not be asked at the moment, because it is banned or has too often
    /// denied what it had said it holds.
    pub(super) fn is_shunned(&self, now: Instant, peer: PeerId) -> bool {
        let until = self.records.get(&peer).and_then(|record| record.disbelieved_until);
        until.is_some_and(|until| until > now) || self.is_banned(now, peer)
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// The number of peers banned now.
    pub(super) fn banned(&self, now: Instant) -> usize {
        self.records.keys().filter(|peer| self.is_banned(now, **peer)).count()
    }

    /// Makes room by dropping the record that was not touched for longest; banned peers last.
    fn make_room(&mut self, now: Instant, peer: PeerId) {
        if self.records.len() < PEERS_REMEMBERED_MAX || self.records.contains_key(&peer) {
            return;
        }
        let banned = |record: &Record| record.banned_until.is_some_and(|until| until > now);
        let oldest = self.records.iter().min_by_key(|(_, record)| (banned(record), record.seen));
        if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
            self.records.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_bans_and_each_further_one_bans_twice_as_long() {
        let (mut now, peer) = (Instant::now(), PeerId::from_seed([1; 32]));
        let mut reputation = Reputation::default();
        for offence in 0..12 {
            let until = reputation.note(now, peer, Conduct::WrongByte).unwrap();
            assert_eq!(until - now, (BAN_FIRST * (1 << offence)).min(BAN_MAX));
            assert!(reputation.is_banned(now, peer) && reputation.banned(now) == 1);
            // Another wrong answer that was under way is no further offence.
            let later = now + (until - now) / 2;
            assert_eq!(reputation.note(later, peer, Conduct::WrongByte), None);
            now = until;
            assert!(!reputation.is_banned(now, peer));
            assert!(reputation.score(peer) < 0.02, "back, but with the lowest score");
        }
    }

    #[test]
    fn who_denies_too_often_is_not_believed_for_a_while() {
        let (now, peer) = (Instant::now(), PeerId::from_seed([1; 32]));
        let mut reputation = Reputation::default();
        // One delivery for each denial: the peer is useful half the time.
        for _ in 0..10 * DENIALS_MAX {
            reputation.note(now, peer, Conduct::Denied);
            reputation.note(now, peer, Conduct::Delivered);
        }
        assert!(!reputation.is_shunned(now, peer));
        for denial in 0..DENIALS_MAX {
            assert!(!reputation.is_shunned(now, peer), "{denial}");
            reputation.note(now, peer, Conduct::Denied);
        }
        assert!(reputation.is_shunned(now, peer) && !reputation.is_banned(now, peer));
        assert!(!reputation.is_shunned(now + DENIED_FOR, peer));
    }

    #[test]
    fn conduct_orders_peers() {
        let now = Instant::now();
        let mut reputation = Reputation::default();
        let order = [
            Conduct::WrongByte,
            Conduct::Violation,
            Conduct::Stalled,
            Conduct::Lost,
            Conduct::Denied,
            Conduct::Delivered,
        ];
        let mut last = 0.0;
        for (index, conduct) in order.into_iter().enumerate() {
            let peer = PeerId::from_seed([index as u8; 32]);
            let banned = reputation.note(now, peer, conduct).is_some();
            assert_eq!(banned, conduct == Conduct::WrongByte);
            assert!(reputation.score(peer) > last, "{conduct:?}");
            last = reputation.score(peer);
        }
        let peer = PeerId::from_seed([99; 32]);
        for _ in 0..1000 {
            reputation.note(now, peer, Conduct::Delivered);
        }
        assert!(reputation.score(peer) > 0.99 && reputation.score(peer) <= 1.0);
    }
}
