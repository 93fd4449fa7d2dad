//! Which peers are known, where they can be reached, and whom to dial when. Pure: the time is an
//! argument.
//!
//! A peer is known because it was connected, because the last run met it, because the local network
//! found it, or because it announced its addresses in a message with its own signature. However it
//! became known, it stays known, and is dialled as long as it is away.
//!
//! Invariants: no pause between two dials is longer than [`DIAL_NEAR_MAX`] for the [`NEAR_MAX`]
//! most useful of those that are away, nor than [`DIAL_FAR_MAX`] for the others; the table is
//! bounded, and a peer that was connected never gives way to one that was only heard of.

use std::cell::OnceCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_ids::{Address, PeerId};

use super::Contact;
use super::limits::{
    DIAL_AGAIN, DIAL_FAR_MAX, DIAL_NEAR_MAX, DIAL_RETRY_FIRST, DIALS_AT_ONCE, HEARD_TURNS,
    KNOWN_ADDRESSES_MAX, KNOWN_HEARD_MAX, KNOWN_PEERS_MAX, NEAR_MAX, STEADY, STRANGER_AFTER,
};
use super::peers::PeerMap;

/// How a peer became known, in ascending order of value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// It announced its addresses, and others passed them on.
    Heard,
    /// The local network found it (mDNS).
    Found,
    /// An earlier run met it.
    Remembered,
    /// It was connected.
    Met,
}

/// A known peer that is not connected, and the state of dialling it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    pub peer: PeerId,
    pub source: Source,
    /// The addresses that are dialled, best first.
    pub addresses: Vec<Address>,
    /// Dials since it was last connected.
    pub dials: u32,
    /// Why the last dial failed.
    pub failure: Option<String>,
    /// Time until it is dialled again; zero if that is due.
    pub next: Duration,
}

struct Entry {
    source: Source,
    /// Addresses at which it was reached, at which the local network found it, and at which it says
    /// it listens.
    reached: Vec<Address>,
    found: Vec<Address>,
    said: Vec<Address>,
    /// When its last message ceases to be believed.
    alive_until: Option<Instant>,
    /// When it was last connected or heard of.
    seen: Instant,
    /// Since when it is connected, and whether it has taken part in this swarm since then.
    connected: Option<Instant>,
    took_part: bool,
    /// It was connected, but belongs to another swarm or does not have this swarm's key.
    is_stranger: bool,
    /// It shares a model's topic with this node.
    is_near: bool,
    /// It is not dialled before this; when it was last dialled; and how often since its pauses
    /// began.
    from: Instant,
    dialled: Option<Instant>,
    dials: u32,
    /// The part of the last of those pauses that is left out: see [`share`].
    share: f64,
    failure: Option<String>,
}

/// See [`Entry::usefulness`].
type Usefulness = (bool, Reverse<Source>, Reverse<bool>, Reverse<Instant>);

impl Entry {
    fn is_alive(&self, now: Instant) -> bool {
        !self.is_stranger && self.alive_until.is_some_and(|until| until > now)
    }

    fn addresses(&self) -> Vec<Address> {
        let mut all: Vec<Address> = Vec::new();
        for address in self.reached.iter().chain(&self.found).chain(&self.said) {
            if !all.contains(address) {
                all.push(address.clone());
            }
        }
        all.truncate(KNOWN_ADDRESSES_MAX);
        all
    }

    /// Whether it is away and worth no more than one from this source.
    fn may_give_way(&self, source: Source) -> bool {
        self.connected.is_none() && (self.is_stranger || self.source <= source)
    }

    /// Its pauses begin anew. A peer that causes this again and again gets at most one dial per
    /// [`DIAL_RETRY_FIRST`].
    fn start_over(&mut self, from: Instant) {
        (self.from, self.dials) = (from, 0);
    }

    /// When it is to be dialled.
    fn due_at(&self, is_near: bool) -> Instant {
        let pause = || match self.dials {
            0 => DIAL_RETRY_FIRST,
            dials => pause(dials, self.share, if is_near { DIAL_NEAR_MAX } else { DIAL_FAR_MAX }),
        };
        self.dialled.map_or(self.from, |dialled| self.from.max(dialled + pause()))
    }

    /// Whether it is away and there is an address at which it can be dialled.
    fn may_be_dialled(&self) -> bool {
        let lists = [&self.reached, &self.found, &self.said];
        self.connected.is_none() && lists.iter().any(|list| !list.is_empty())
    }

    /// Notes a dial. `None` if there is no address to dial.
    fn dial(&mut self, now: Instant, own: PeerId, peer: PeerId) -> Option<Vec<Address>> {
        self.dialled = Some(now);
        self.dials = self.dials.saturating_add(1);
        self.share = share(own, peer, self.dials);
        Some(self.addresses()).filter(|addresses| !addresses.is_empty())
    }

    /// Orders the most useful first: members of this swarm, then the best source, then the latest
    /// seen.
    fn usefulness(&self) -> Usefulness {
        (self.is_stranger, Reverse(self.source), Reverse(self.is_near), Reverse(self.seen))
    }
}

/// Every known peer.
pub(super) struct Known {
    own: PeerId,
    /// The connected peers, with or without an entry.
    connected: BTreeSet<PeerId>,
    peers: PeerMap<Box<Entry>>,
    /// How many of them are only heard of, and when the next of those may give way.
    heard: usize,
    next_turn: Option<Instant>,
    /// Until when all that are away say that they are alive, as of a look at all; unknown if absent.
    none_lost_until: Option<Instant>,
    /// Who gives way to one that is only heard of, the next one last, as of a look at all.
    turns: Vec<(Instant, PeerId)>,
}

impl Known {
    pub(super) fn new(own: PeerId) -> Self {
        let (connected, peers) = (BTreeSet::new(), PeerMap::default());
        Self {
            own,
            connected,
            peers,
            heard: 0,
            next_turn: None,
            none_lost_until: None,
            turns: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// The peers that were never met, found or remembered.
    pub(super) const fn heard(&self) -> usize {
        self.heard
    }

    /// The last run or the local network says that a peer is at these addresses; it is dialled at
    /// once.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        peer: PeerId,
        source: Source,
        addresses: Vec<Address>,
    ) {
        let Some(entry) = self.entry(now, peer, source) else { return };
        let list = match source {
            Source::Found => &mut entry.found,
            _ => &mut entry.reached,
        };
        // The local network reports each address once, so earlier ones are kept after the new ones.
        for address in addresses.into_iter().rev() {
            list.retain(|known| *known != address);
            list.insert(0, address);
        }
        list.truncate(KNOWN_ADDRESSES_MAX);
        entry.start_over(now);
        self.none_lost_until = None;
    }

    /// A peer's own message says where it listens; it is believed until `until`. `is_near`: it shares a
    /// model's topic with this node, so it has priority over others that were only heard of. True if that is
    /// new.
    pub(super) fn hear(
        &mut self,
        now: Instant,
        peer: PeerId,
        addresses: impl AsRef<[Address]>,
        (until, is_near): (Instant, bool),
    ) -> bool {
        let addresses = addresses.as_ref();
        // A page listens nowhere, so it is not looked for.
        if addresses.is_empty() && !self.peers.contains_key(&peer) {
            return false;
        }
        if is_near {
            // Somebody far gives way to it at once.
            self.next_turn = self.next_turn.filter(|_| self.peers.contains_key(&peer));
        }
        let Some(entry) = self.entry(now, peer, Source::Heard) else { return false };
        entry.is_near |= is_near;
        let was_away = !entry.is_alive(now);
        let moved = addresses.iter().any(|address| !entry.said.contains(address));
        let said = &addresses[..addresses.len().min(KNOWN_ADDRESSES_MAX)];
        if entry.said != said {
            entry.said = said.to_vec();
        }
        entry.alive_until = Some(until);
        entry.is_stranger = false;
        entry.seen = now;
        if was_away || moved {
            entry.start_over(now);
        }
        self.none_lost_until = self.none_lost_until.map(|none| none.min(until));
        was_away || moved
    }

    /// Sets the connected peers. A peer that has gone is dialled again at once, unless its
    /// connections do not last.
    pub(super) fn contacts(&mut self, now: Instant, contacts: &BTreeMap<PeerId, Contact>) {
        let before = std::mem::replace(&mut self.connected, contacts.keys().copied().collect());
        for (peer, contact) in contacts {
            // A peer that cannot be dialled is not remembered.
            if contact.reached.is_empty() && !self.peers.contains_key(peer) {
                continue;
            }
            let Some(entry) = self.entry(now, *peer, Source::Met) else { continue };
            if !contact.reached.is_empty() && entry.reached != contact.reached {
                entry.reached.clone_from(&contact.reached);
                entry.reached.truncate(KNOWN_ADDRESSES_MAX);
            }
            entry.connected.get_or_insert(now);
            entry.took_part |= contact.listens;
            entry.is_stranger &= !contact.listens;
            (entry.seen, entry.failure) = (now, None);
        }
        self.none_lost_until = None;
        let own = self.own;
        // Whoever has an entry that says it is connected was so before.
        for peer in before.iter().filter(|peer| !contacts.contains_key(*peer)) {
            let Some(entry) = self.peers.get_mut(peer) else { continue };
            let Some(since) = entry.connected.take() else { continue };
            let stayed = now.saturating_duration_since(since);
            entry.is_stranger |= !entry.took_part && stayed >= STRANGER_AFTER;
            entry.took_part = false;
            if stayed >= STEADY {
                // Both ends notice at the same time, but only one of them should dial.
                entry.start_over(now + DIAL_AGAIN.mul_f64(share(own, *peer, 0)));
            }
        }
    }

    /// Call when a dial of a peer has failed or was refused. `is_stranger`: it cannot take part in
    /// the swarm at all.
    pub(super) fn failed(&mut self, peer: PeerId, reason: String, is_stranger: bool) {
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.is_stranger |= is_stranger;
            entry.failure = Some(reason);
        }
        self.none_lost_until = None;
    }

    /// Call when a peer is to be dialled for the others, because they doubt that it is alive.
    pub(super) fn call(&mut self, now: Instant, peer: PeerId) {
        if let Some(entry) = self.peers.get_mut(&peer).filter(|entry| entry.connected.is_none()) {
            entry.start_over(now);
        }
    }

    /// Call when the network has changed: peers that are away may be reachable now.
    pub(super) fn network_changed(&mut self, now: Instant) {
        for entry in self.peers.values_mut().filter(|entry| entry.connected.is_none()) {
            entry.start_over(now);
        }
    }

    /// The peers to dial now, and where; and when the next is to be dialled. Peers that are alive but not
    /// connected are dialled while there is `room` for more connections; lost peers are dialled in any case.
    pub(super) fn round(
        &mut self,
        now: Instant,
        mut room: usize,
        may: impl Fn(PeerId) -> bool,
    ) -> (Vec<(PeerId, Vec<Address>)>, Option<Instant>) {
        let (own, ranks) = (self.own, OnceCell::new());
        let mut all = Vec::new();
        let mut next = None::<Instant>;
        for (peer, entry) in self.peers.iter().filter(|(_, entry)| entry.may_be_dialled()) {
            let at = self.due_at(now, (*peer, entry), &ranks);
            if at <= now {
                all.push((entry.usefulness(), *peer));
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        all.sort_unstable();
        let mut due = Vec::new();
        for (_, peer) in all {
            let Some(entry) = self.peers.get_mut(&peer) else { continue };
            let is_alive = entry.is_alive(now);
            if is_alive && room == 0 || !may(peer) {
                continue;
            }
            room -= usize::from(is_alive);
            due.extend(entry.dial(now, own, peer).map(|addresses| (peer, addresses)));
            if let Some(entry) = self.peers.get(&peer) {
                let again = self.due_at(now, (peer, entry), &ranks);
                next = Some(next.map_or(again, |next| next.min(again)));
            }
            if due.len() >= DIALS_AT_ONCE {
                break;
            }
        }
        (due, next)
    }

    /// Where to dial a peer that is needed. `None` if its turn has not come yet.
    pub(super) fn take(&mut self, now: Instant, peer: PeerId) -> Option<Vec<Address>> {
        let own = self.own;
        let entry = self.peers.get_mut(&peer).filter(|entry| entry.connected.is_none())?;
        if entry.due_at(true) > now {
            return None;
        }
        entry.dial(now, own, peer)
    }

    /// When the first of these peers may be dialled again, after `now`.
    pub(super) fn next_of(
        &self,
        now: Instant,
        peers: impl Iterator<Item = PeerId>,
    ) -> Option<Instant> {
        let due = peers.filter_map(|peer| Some(self.peers.get(&peer)?.due_at(true)));
        due.filter(|at| *at > now).min()
    }

    /// Whether any peer is away that does not say itself that it is alive.
    pub(super) fn has_lost(&mut self, now: Instant) -> bool {
        if self.none_lost_until.is_some_and(|until| now < until) {
            return false;
        }
        let mut away = self.peers.values().filter(|entry| entry.connected.is_none());
        // The end of each one's lease, unless somebody has none that runs.
        let first = away.try_fold(now + DIAL_FAR_MAX, |first, entry| {
            entry.alive_until.filter(|_| entry.is_alive(now)).map(|until| first.min(until))
        });
        self.none_lost_until = first;
        first.is_none()
    }

    /// The known peers that are away, the most useful first.
    pub(super) fn report(&self, now: Instant) -> Vec<Away> {
        let away = self.away(now).into_iter();
        let told = away.filter_map(|(peer, at)| {
            let entry = self.peers.get(&peer)?;
            Some(Away {
                peer,
                source: entry.source,
                addresses: entry.addresses(),
                dials: entry.dials,
                failure: entry.failure.clone(),
                next: at.saturating_duration_since(now),
            })
        });
        told.collect()
    }

    /// The peers that are away, the most useful first, and when each is to be dialled.
    fn away(&self, now: Instant) -> Vec<(PeerId, Instant)> {
        let ranks = OnceCell::new();
        let away = self.peers.iter().filter(|(_, entry)| entry.may_be_dialled());
        let mut away: Vec<(&PeerId, &Entry)> = away.map(|(peer, entry)| (peer, &**entry)).collect();
        away.sort_unstable_by_key(|(peer, entry)| (entry.usefulness(), **peer));
        let at =
            |(peer, entry): (&PeerId, &Entry)| (*peer, self.due_at(now, (*peer, entry), &ranks));
        away.into_iter().map(at).collect()
    }

    /// When a peer is to be dialled. Whether it is among the most useful is worked out, once for all, if that
    /// matters.
    fn due_at(
        &self,
        now: Instant,
        (peer, entry): (PeerId, &Entry),
        ranks: &OnceCell<Ranks>,
    ) -> Instant {
        let at = entry.due_at(true);
        if at == entry.due_at(false) {
            return at;
        }
        entry.due_at(ranks.get_or_init(|| self.ranks(now)).is_near(now, peer, entry))
    }

    /// Which of the peers that are away are the most useful. Those that are alive are counted separately: they
    /// are found when needed, and do not delay the lost ones.
    fn ranks(&self, now: Instant) -> Ranks {
        let mut kinds = [Vec::new(), Vec::new()];
        for (peer, entry) in self.peers.iter().filter(|(_, entry)| entry.may_be_dialled()) {
            kinds[usize::from(entry.is_alive(now))].push((entry.usefulness(), peer));
        }
        let last = kinds.map(|mut kind| {
            let is_full = kind.len() > NEAR_MAX;
            is_full.then(|| *kind.select_nth_unstable(NEAR_MAX - 1).1)
        });
        Ranks(last.map(|last| last.map(|(usefulness, peer)| (usefulness, *peer))))
    }

    /// A peer's entry, created if there is room. The least useful of the peers that are away gives
    /// way to one whose source is at least as good.
    fn entry(&mut self, now: Instant, peer: PeerId, source: Source) -> Option<&mut Entry> {
        if peer == self.own {
            return None;
        }
        if !self.peers.contains_key(&peer) {
            if !self.make_room(now, source) {
                return None;
            }
            self.heard += usize::from(source == Source::Heard);
            let entry = Entry {
                source,
                reached: Vec::new(),
                found: Vec::new(),
                said: Vec::new(),
                alive_until: None,
                seen: now,
                connected: self.connected.contains(&peer).then_some(now),
                took_part: false,
                is_stranger: false,
                is_near: false,
                from: now,
                dialled: None,
                dials: 0,
                share: 0.0,
                failure: None,
            };
            self.peers.insert(peer, Box::new(entry));
        }
        let entry = self.peers.get_mut(&peer)?;
        self.heard -= usize::from(entry.source == Source::Heard && source > Source::Heard);
        entry.source = entry.source.max(source);
        Some(entry)
    }

    /// Whether there is room for one more peer from this source, after another has given way.
    fn make_room(&mut self, now: Instant, source: Source) -> bool {
        let is_heard = source == Source::Heard;
        let is_full = self.peers.len() >= KNOWN_PEERS_MAX;
        let is_enough = is_heard && self.heard >= KNOWN_HEARD_MAX;
        if !is_full && !is_enough {
            return true;
        }
        // In a large swarm somebody new speaks all the time.
        if is_heard && self.next_turn.is_some_and(|turn| now < turn) {
            return false;
        }
        if is_heard {
            self.next_turn = Some(now + HEARD_TURNS);
        }
        let least = if is_heard { self.least_heard() } else { self.least_useful(source) };
        let Some(entry) = least.and_then(|least| self.peers.remove(&least)) else { return false };
        self.heard -= usize::from(entry.source == Source::Heard);
        true
    }

    /// The least useful of the peers that are away and are worth no more than one from this source.
    fn least_useful(&self, source: Source) -> Option<PeerId> {
        let away = self.peers.iter().filter(|(_, entry)| entry.may_give_way(source));
        let least = away.max_by_key(|(peer, entry)| (entry.usefulness(), **peer));
        least.map(|(peer, _)| *peer)
    }

    /// The same for one that was only heard of. They are put in order once for many that give way: in a
    /// large swarm somebody does all the time.
    fn least_heard(&mut self) -> Option<PeerId> {
        while let Some((seen, peer)) = self.turns.pop() {
            let entry = self.peers.get(&peer).filter(|entry| entry.may_give_way(Source::Heard));
            // Whoever was heard since then has a later turn.
            if entry.is_some_and(|entry| entry.seen == seen) {
                return Some(peer);
            }
        }
        let away = self.peers.iter().filter(|(_, entry)| entry.may_give_way(Source::Heard));
        let mut away: Vec<(&PeerId, &Entry)> = away.map(|(peer, entry)| (peer, &**entry)).collect();
        away.sort_unstable_by_key(|(peer, entry)| (entry.usefulness(), **peer));
        self.turns.extend(away.into_iter().map(|(peer, entry)| (entry.seen, *peer)));
        self.turns.pop().map(|(_, peer)| peer)
    }
}

/// The last of those that are among the most useful, of the lost and of the living; `None` if all are.
struct Ranks([Option<(Usefulness, PeerId)>; 2]);

impl Ranks {
    fn is_near(&self, now: Instant, peer: PeerId, entry: &Entry) -> bool {
        let last = &self.0[usize::from(entry.is_alive(now))];
        !entry.is_stranger && last.as_ref().is_none_or(|last| (entry.usefulness(), peer) <= *last)
    }
}

/// The pause after a number of dials. It doubles each time, up to `max`, and is up to a quarter
/// shorter, so that nodes that lost each other together do not dial in step.
fn pause(dials: u32, share: f64, max: Duration) -> Duration {
    let doublings = (dials - 1).min(16);
    let whole = DIAL_RETRY_FIRST.saturating_mul(1 << doublings).min(max);
    whole.mul_f64(1.0 - share / 4.0)
}

/// A number from 0 to 1 that differs from one pair of peers and one dial to the next. It is not
/// random, because the same events must give the same actions.
fn share(own: PeerId, peer: PeerId, dials: u32) -> f64 {
    let mut bytes = [own.to_bytes(), peer.to_bytes()].concat();
    bytes.extend_from_slice(&dials.to_le_bytes());
    let mut first = [0; 4];
    first.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..4]);
    f64::from(u32::from_le_bytes(first)) / f64::from(u32::MAX)
}

#[cfg(test)]
#[path = "known_tests.rs"]
mod tests;
