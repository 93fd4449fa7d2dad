//! Which peer is asked for which bytes and when, and what is asked of two peers. Pure: the time,
//! the holdings and each request's progress are arguments, and nothing is sent from here.
//!
//! A read is divided into requests as peers get room. A request is as long as its peer delivers in
//! `REQUEST_TIME`, and never longer than the protocol allows. Reads for which a token waits come
//! first, by deadline; then shards that have begun, then the rarest. If a request is late or its
//! peer went silent, a second peer is asked for the missing bytes; the same holds for the last
//! request of a read if an idle peer would be done sooner.
//!
//! Invariants: every byte of a read is still to do, asked for (of at most two peers), or delivered.
//! Proved bytes are never asked for again. Repeated bytes stay within a fraction of those
//! delivered.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::limits::{
    HEDGE_BYTES_FREE, HEDGE_SHARE, HEDGES_MAX, PIECE_BYTES_MIN, PIPELINE_TIME, READS_MAX,
    REQUEST_BYTES_MIN, REQUEST_TIME, REQUESTS_PER_PEER_MAX, REQUESTS_PER_READ_MAX,
    REQUESTS_UNMEASURED_MAX, RETRY_FIRST, RETRY_MAX, STARTED_MAX,
};
use super::links::{Begun, Links};
use super::planted::{self, Plant};
use super::{ReadId, RequestId, TooMany};
use doppler_store::groups::Chunks;
use doppler_store::verified::{GROUP_BYTES, SERVE_BYTES_MAX};
use doppler_store::{ByteRange, Priority, ReadRequest, ShardId};

/// A connected, trusted peer that holds some of an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Holder {
    pub(super) peer: PeerId,
    /// 0..=1
    pub(super) score: f64,
    pub(super) chunks: Chunks,
}

/// A request to make of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    pub read: ReadId,
    pub request: RequestId,
    pub peer: PeerId,
    pub range: ByteRange,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All of it came.
    Delivered,
    /// This node cancelled it, because another peer has the rest.
    Stopped,
    /// No more will come. This peer is asked for this read again only after a while.
    Failed,
}

/// The consequences of a request's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    /// The part of what it proved that is kept.
    pub(super) keep: Option<ByteRange>,
    pub(super) beaten: Option<Beaten>,
}

/// A request that another peer's answer made unnecessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Beaten {
    pub(super) request: RequestId,
    pub(super) peer: PeerId,
    /// Whether its peer had sent nothing for a long time.
    pub(super) is_silent: bool,
    /// Whether what it proved is still wanted, so that it must be stopped rather than dropped.
    pub(super) is_wanted: bool,
}

/// A peer that failed a read. It is asked again only after a while.
struct Failed {
    retry: Instant,
    wait: Duration,
}

struct Request {
    begun: Begun,
    range: ByteRange,
    /// The request to another peer for the missing bytes of this one, or the one whose missing
    /// bytes this one requests. Both end at the same byte.
    twin: Option<RequestId>,
}

impl Request {
    /// The first byte that is not proved, or the range's end if all of it is. `seen` is the byte up
    /// to which it is proved; 0 before its first group.
    fn proved(&self, seen: u64) -> u64 {
        seen.clamp(self.range.start(), self.range.end())
    }
}

struct Read {
    request: ReadRequest,
    arrived: u64,
    /// In ascending order; each begins at a group's start.
    todo: Vec<ByteRange>,
    requests: BTreeMap<RequestId, Request>,
    failed: BTreeMap<PeerId, Failed>,
}

/// The smallest is served first.
type Urgency = (Priority, bool, Option<Instant>, bool, usize, u64);

/// Reads in flight, and the peers' loads.
#[derive(Default)]
pub(super) struct Scheduler {
    pub(super) links: Links,
    reads: BTreeMap<ReadId, Read>,
    /// Shards of which something came recently, with an increasing number.
    started: BTreeMap<ShardId, u64>,
    numbers: u64,
    twins: usize,
    delivered: u64,
    /// Bytes asked for a second time while the first peer was still sending.
    repeated: u64,
}

impl Scheduler {
    /// Adds a read. Its range is extended to the start of its first group.
    pub(super) fn add(&mut self, id: ReadId, request: ReadRequest) -> Result<(), TooMany> {
        if self.reads.len() >= READS_MAX {
            return Err(TooMany { what: "reads under way", max: READS_MAX });
        }
        let arrived = self.number();
        let start = request.range.start() / GROUP_BYTES * GROUP_BYTES;
        let todo = ByteRange::new(start, request.range.end()).into_iter().collect();
        let (requests, failed) = (BTreeMap::new(), BTreeMap::new());
        self.reads.insert(id, Read { request, arrived, todo, requests, failed });
        Ok(())
    }

    /// Removes a read that ended, for whatever reason, and cancels its requests.
    pub(super) fn remove(&mut self, now: Instant, id: ReadId) {
        let Some(read) = self.reads.remove(&id) else { return };
        for request in read.requests.into_values() {
            self.twins -= usize::from(request.twin.is_some());
            self.links.end(now, request.begun, 0);
        }
    }

    /// Whether the read was delivered in full.
    pub(super) fn is_done(&self, id: ReadId) -> bool {
        self.reads.get(&id).is_none_or(|read| read.todo.is_empty() && read.requests.is_empty())
    }

    /// Reads, the requests of the one that has most, requests asked twice, shards begun.
    pub(super) fn fill(&self) -> (usize, usize, usize, usize) {
        let requests = self.reads.values().map(|read| read.requests.len()).max().unwrap_or(0);
        (self.reads.len(), requests, self.twins, self.started.len())
    }

    pub(super) fn in_flight(&self, id: ReadId) -> usize {
        self.reads.get(&id).map_or(0, |read| read.requests.len())
    }

    /// Marks delivered bytes as needed again.
    pub(super) fn put_back(&mut self, id: ReadId, range: ByteRange) {
        if let Some(read) = self.reads.get_mut(&id) {
            insert(&mut read.todo, range);
        }
    }

    /// Bytes that the requests of a read have proved. Bytes asked of two peers count once.
    pub(super) fn proved(&self, id: ReadId, seen: &dyn Fn(RequestId) -> u64) -> u64 {
        let Some(read) = self.reads.get(&id) else { return 0 };
        let proved = |id: &RequestId, request: &Request| request.proved(seen(*id));
        let each = read.requests.iter().map(|(id, request)| {
            let own = proved(id, request) - request.range.start();
            let twin = request.twin.and_then(|twin| Some((twin, read.requests.get(&twin)?)));
            // Both end at the same byte; the one that starts later covers what the other lacks.
            let repeated = twin.filter(|(_, twin)| twin.range.start() >= request.range.start());
            let repeated = repeated.map_or(0, |(twin_id, twin)| {
                let both = proved(id, request).min(proved(&twin_id, twin));
                let is_later = twin.range.start() > request.range.start() || twin_id > *id;
                if is_later { both.saturating_sub(twin.range.start()) } else { 0 }
            });
            own - repeated
        });
        each.sum()
    }

    /// Ends a request that has proved its range up to `proved`. Returns what of it is kept and
    /// which other request is unnecessary; `None` if it was cancelled before. `seen` gives the
    /// progress of the other request.
    pub(super) fn end(
        &mut self,
        now: Instant,
        id: ReadId,
        request: RequestId,
        outcome: Outcome,
        proved: u64,
        seen: &dyn Fn(RequestId) -> u64,
    ) -> Option<Ended> {
        let read = self.reads.get_mut(&id)?;
        let ended = read.requests.remove(&request)?;
        let (start, end) = (ended.range.start(), ended.range.end());
        let proved = proved.clamp(start, end);
        let delivered = if outcome == Outcome::Delivered { proved - start } else { 0 };
        self.links.end(now, ended.begun, delivered);
        if outcome == Outcome::Failed {
            let failed = read.failed.entry(ended.begun.peer);
            let failed = failed.or_insert(Failed { retry: now, wait: RETRY_FIRST });
            failed.retry = now + failed.wait;
            failed.wait = (failed.wait * 2).min(RETRY_MAX);
        }
        let twin = ended.twin.and_then(|twin| Some((twin, read.requests.get_mut(&twin)?)));
        // The kept range ends at `kept_to`. The range that nobody is asked for any more is
        // `kept_to..missing_to`.
        let (mut kept_to, mut missing_to) = (proved, end);
        let mut beaten = None;
        if let Some((request, other)) = twin {
            self.twins -= 2;
            other.twin = None;
            let peer = other.begun.peer;
            let silent = self.links.is_silent(now, peer);
            if proved == end || silent && proved > other.proved(seen(request)) {
                // Of the other request only what precedes this one's first byte is wanted, if
                // anything.
                let wanted = ByteRange::new(other.range.start(), start);
                if let Some(range) = wanted {
                    other.range = range;
                } else {
                    let begun = other.begun;
                    read.requests.remove(&request);
                    self.links.end(now, begun, 0);
                }
                if silent {
                    self.links.suspect(peer);
                }
                beaten =
                    Some(Beaten { request, peer, is_silent: silent, is_wanted: wanted.is_some() });
            } else {
                // The other request continues.
                missing_to = other.range.start();
                kept_to = proved.min(missing_to);
            }
        }
        let missing = ByteRange::new(kept_to, missing_to);
        if let Some(missing) = missing.filter(|_| !planted::is(Plant::Picker)) {
            insert(&mut read.todo, missing);
        }
        let keep = ByteRange::new(start, kept_to);
        if let Some(kept) = keep {
            self.delivered += kept.len();
            let shard = read.request.shard;
            self.note_started(shard);
        }
        Some(Ended { keep, beaten })
    }

    /// Gives work to peers that have room. `holders` says who holds a shard, `seen` how far a
    /// request got. With `hedge`, late requests are asked of a second peer, too.
    pub(super) fn schedule(
        &mut self,
        now: Instant,
        hedge: bool,
        holders: &dyn Fn(ShardId) -> Vec<Holder>,
        seen: &dyn Fn(ReadId, RequestId) -> u64,
    ) -> Vec<Ask> {
        let mut known: BTreeMap<ShardId, Vec<Holder>> = BTreeMap::new();
        for read in self.reads.values() {
            known.entry(read.request.shard).or_insert_with_key(|shard| holders(*shard));
        }
        let mut order: Vec<(Urgency, ReadId)> = Vec::with_capacity(self.reads.len());
        for (id, read) in &self.reads {
            let rarity = known.get(&read.request.shard).map_or(0, Vec::len);
            order.push((self.urgency(read, rarity), *id));
        }
        order.sort_unstable();
        let mut asks = Vec::new();
        for (_, id) in &order {
            while let Some(ask) = self.next(now, *id, &known) {
                asks.push(ask);
            }
        }
        if hedge {
            let waiting = self.reads.values().any(|read| !read.todo.is_empty());
            for (_, id) in &order {
                self.hedge(now, *id, &known, !waiting, seen, &mut asks);
            }
        }
        asks
    }

    /// When this read should be scheduled again, if nothing happens before.
    pub(super) fn wake(&self, now: Instant, id: ReadId) -> Option<Instant> {
        let read = self.reads.get(&id)?;
        let retries = read.failed.values().map(|failed| failed.retry);
        let alone = read.requests.values().filter(|request| request.twin.is_none());
        let late = alone.flat_map(|request| {
            let silent = self.links.silent_at(request.begun.peer);
            silent.into_iter().chain([self.links.late_at(&request.begun)])
        });
        retries.chain(late).filter(|at| *at > now).min()
    }

    fn urgency(&self, read: &Read, rarity: usize) -> Urgency {
        let ReadRequest { shard, priority, deadline, .. } = read.request;
        // Reads without a deadline come after those with one.
        let by_deadline = (deadline.is_none(), deadline);
        let waits = priority == Priority::Token;
        let fresh = !waits && !self.started.contains_key(&shard);
        let rarity = if waits { 0 } else { rarity };
        (priority, by_deadline.0, by_deadline.1, fresh, rarity, read.arrived)
    }

    /// The next request of a read, if a peer has room for one.
    fn next(
        &mut self,
        now: Instant,
        id: ReadId,
        known: &BTreeMap<ShardId, Vec<Holder>>,
    ) -> Option<Ask> {
        let read = self.reads.get(&id)?;
        if read.todo.is_empty() || read.requests.len() >= REQUESTS_PER_READ_MAX {
            return None;
        }
        let holders = known.get(&read.request.shard)?;
        let (at, range, peer) = self.choose(now, read, holders)?;
        let read = self.reads.get_mut(&id)?;
        let whole = read.todo.remove(at);
        let rest = [(whole.start(), range.start()), (range.end(), whole.end())];
        for (start, end) in rest.into_iter().rev() {
            if let Some(rest) = ByteRange::new(start, end) {
                read.todo.insert(at, rest);
            }
        }
        Some(self.ask(now, id, peer, range))
    }

    /// Chooses the peer to ask next, for the first bytes still to do that it holds. Returns their
    /// index in `todo`, their number, and the peer.
    fn choose(
        &self,
        now: Instant,
        read: &Read,
        holders: &[Holder],
    ) -> Option<(usize, ByteRange, PeerId)> {
        let first = |holder: &Holder| {
            let ranges = read.todo.iter().enumerate();
            ranges.into_iter().find_map(|(at, range)| Some((at, holder.chunks.first(*range)?)))
        };
        let able: Vec<&Holder> = holders.iter().filter(|holder| first(holder).is_some()).collect();
        let start = read.todo.first()?.start();
        let best = self.best(now, read, &able, start, None)?;
        let (at, held) = first(best)?;
        let rate = self.links.assumed_rate(best.peer);
        let by_rate = (rate * REQUEST_TIME.as_secs_f64()) as u64;
        // Divided among the peers, but not so finely that round trips dominate.
        let todo: u64 = read.todo.iter().map(ByteRange::len).sum();
        let share = todo.div_ceil(able.len() as u64).max(PIECE_BYTES_MIN);
        let len = by_rate.clamp(REQUEST_BYTES_MIN, share);
        let len = len.next_multiple_of(GROUP_BYTES).min(SERVE_BYTES_MAX);
        let end = held.start().saturating_add(len).min(held.end());
        Some((at, ByteRange::new(held.start(), end)?, best.peer))
    }

    /// The peer that should be done first: bytes in flight plus bytes to ask for, divided by its
    /// rate and its score. Equal peers are ordered by the bytes' offset, so that ranges spread over
    /// unknown peers.
    fn best<'a>(
        &self,
        now: Instant,
        read: &Read,
        holders: &[&'a Holder],
        start: u64,
        not: Option<PeerId>,
    ) -> Option<&'a Holder> {
        let salt = salt(read.request.shard, start);
        let mut best: Option<(f64, u64, &Holder)> = None;
        for holder in holders {
            let peer = holder.peer;
            let failed = read.failed.get(&peer).is_some_and(|failed| failed.retry > now);
            if Some(peer) == not || failed || !self.has_room(now, read, peer) {
                continue;
            }
            let seconds = self.links.seconds(peer, PIECE_BYTES_MIN) / holder.score.max(0.01);
            let tie = tie_break(peer, salt);
            let better = best.is_none_or(|(least, other, _)| {
                // Times within a tenth count as equal, because small differences would send all
                // load to one peer.
                if (seconds - least).abs() <= 0.1 * least { tie < other } else { seconds < least }
            });
            if better {
                best = Some((seconds, tie, holder));
            }
        }
        best.map(|(_, _, holder)| holder)
    }

    fn has_room(&self, now: Instant, read: &Read, peer: PeerId) -> bool {
        let requests = self.links.requests(peer);
        if requests == 0 {
            return true;
        }
        let requests_max = match read.request.priority {
            Priority::Token => REQUESTS_PER_PEER_MAX,
            // Room is left for reads for which a token will wait.
            Priority::Prefetch | Priority::Bulk => REQUESTS_PER_PEER_MAX * 3 / 4,
        };
        let silent = self.links.is_silent(now, peer) || self.links.is_suspect(peer);
        if requests >= requests_max || silent {
            return false;
        }
        match self.links.rate(peer) {
            None => requests < REQUESTS_UNMEASURED_MAX,
            Some(rate) => self.links.in_flight(peer) as f64 <= rate * PIPELINE_TIME.as_secs_f64(),
        }
    }

    /// Asks a second peer for what is late.
    fn hedge(
        &mut self,
        now: Instant,
        id: ReadId,
        known: &BTreeMap<ShardId, Vec<Holder>>,
        nothing_waits: bool,
        seen: &dyn Fn(ReadId, RequestId) -> u64,
        asks: &mut Vec<Ask>,
    ) {
        let Some(read) = self.reads.get(&id) else { return };
        let Some(holders) = known.get(&read.request.shard) else { return };
        let last = read.todo.is_empty();
        let mut second = Vec::new();
        for (first, request) in &read.requests {
            let begun = &request.begun;
            if request.twin.is_some() {
                continue;
            }
            let silent = self.links.is_silent(now, begun.peer);
            let late = self.links.late_at(begun) <= now
                && (last || read.request.priority == Priority::Token);
            if !(silent || late || last && nothing_waits) {
                continue;
            }
            // If all is proved, it is about to end.
            let missing = ByteRange::new(request.proved(seen(id, *first)), request.range.end());
            let Some(missing) = missing else { continue };
            let fits = |holder: &&Holder| holder.chunks.cover(missing);
            let able: Vec<&Holder> = holders.iter().filter(fits).collect();
            let start = missing.start();
            let Some(best) = self.best(now, read, &able, start, Some(begun.peer)) else { continue };
            if !silent && !late && !self.sooner(now, begun, best.peer, missing.len()) {
                continue;
            }
            second.push((*first, best.peer, missing, silent));
        }
        for (first, peer, range, silent) in second {
            let allowed = HEDGE_BYTES_FREE + (self.delivered as f64 * HEDGE_SHARE) as u64;
            let too_many = !silent && self.repeated + range.len() > allowed;
            let Some(read) = self.reads.get(&id) else { return };
            if self.twins + 2 > 2 * HEDGES_MAX || too_many || !self.has_room(now, read, peer) {
                continue;
            }
            if !silent {
                self.repeated += range.len();
            }
            let ask = self.ask(now, id, peer, range);
            asks.push(ask);
            let Some(read) = self.reads.get_mut(&id) else { return };
            for (one, other) in [(first, ask.request), (ask.request, first)] {
                if let Some(request) = read.requests.get_mut(&one) {
                    request.twin = Some(other);
                    self.twins += 1;
                }
            }
        }
    }

    /// Whether an idle peer would deliver the missing bytes in half the time that the first peer
    /// still needs.
    fn sooner(&self, now: Instant, begun: &Begun, peer: PeerId, missing: u64) -> bool {
        let left = begun.due().map(|due| due.saturating_duration_since(now).as_secs_f64());
        self.links.requests(peer) == 0
            && self.links.rate(peer).is_some()
            && left.is_some_and(|left| 2.0 * self.links.seconds(peer, missing) < left)
    }

    fn ask(&mut self, now: Instant, read: ReadId, peer: PeerId, range: ByteRange) -> Ask {
        let request = self.number();
        let begun = self.links.begin(now, peer, range.len());
        if let Some(read) = self.reads.get_mut(&read) {
            read.requests.insert(request, Request { begun, range, twin: None });
        }
        Ask { read, request, peer, range }
    }

    fn note_started(&mut self, shard: ShardId) {
        let number = self.number();
        self.started.insert(shard, number);
        if self.started.len() > STARTED_MAX {
            let oldest = self.started.iter().min_by_key(|(_, number)| **number);
            if let Some(oldest) = oldest.map(|(shard, _)| *shard) {
                self.started.remove(&oldest);
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

/// Inserts a range in order, joined with its neighbours.
fn insert(todo: &mut Vec<ByteRange>, range: ByteRange) {
    let at = todo.partition_point(|other| other.start() < range.start());
    todo.insert(at, range);
    let mut joined: Vec<ByteRange> = Vec::with_capacity(todo.len());
    for range in todo.drain(..) {
        match joined.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = ByteRange::new(last.start(), range.end()).unwrap_or(*last);
            }
            _ => joined.push(range),
        }
    }
    *todo = joined;
}

/// A hash of a range, so that ranges spread over equal peers.
fn salt(shard: ShardId, start: u64) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&shard.as_bytes()[..8]);
    u64::from_le_bytes(first) ^ (start / GROUP_BYTES)
}

/// A number that orders peers differently for each salt.
fn tie_break(peer: PeerId, salt: u64) -> u64 {
    let mut bytes = peer.to_bytes();
    bytes.extend_from_slice(&salt.to_le_bytes());
    let hash = blake3::hash(&bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
