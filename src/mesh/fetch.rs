//! One read from peers: asks whom the scheduler says, proves what comes, and goes
//! on until it is there or nobody is left to wait for.
//!
//! Invariants: it never polls: it waits for its orders, for who holds what to
//! change, for an answer or a time; dropping the read ends its requests and gives
//! back their place. What a request proved before it broke off or was given up is kept.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use doppler_swarm::{PeerId, SwarmHandle};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::limiter::Limiter;
use super::options::{ATTEMPTS_MAX, REQUESTS_PER_READ_MAX};
use super::reputation::Conduct;
use super::scheduler::{Ask, Ended, Outcome, ReadId, RequestId};
use super::shard_client::{Client, Failure, FailureKind, Order, RELAYED};
use super::state::{Holders, Shared};
use crate::wire::ShardRequest;
use doppler_store::verified::{
    GROUP_BYTES, OBJECT_BYTES_MAX, RangeDecoder, VerifiedBuf, VerifiedRange,
};
use doppler_store::{ByteRange, ReadError, ReadRequest};

/// What every read needs; shared by all of them.
pub(super) struct Fetcher {
    pub(super) shared: Arc<Shared>,
    pub(super) swarm: SwarmHandle,
    pub(super) client: Client,
    pub(super) download: Arc<Limiter>,
    pub(super) find_timeout: Duration,
}

/// A deadline beyond any: used where the caller has none.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// A proved piece, and who sent it.
struct Part {
    peer: PeerId,
    piece: VerifiedBuf,
}

/// What a request's task brings home.
type Answer = (Ask, Result<VerifiedBuf, Failure>);

/// The memory of a read, given out to its requests. What a request that failed had is
/// not given out again: who asks for those bytes next gets memory of its own.
struct Memory {
    /// Unused stretches, by where they begin in the object.
    free: BTreeMap<u64, BytesMut>,
}

impl Memory {
    fn new(range: ByteRange) -> Self {
        // The last group may be sent whole.
        let start = range.start() / GROUP_BYTES * GROUP_BYTES;
        let bytes = range.end().next_multiple_of(GROUP_BYTES) - start;
        Self { free: BTreeMap::from([(start, BytesMut::with_capacity(bytes as usize))]) }
    }

    /// Memory for a range; none if it is given out, or in use in part.
    fn take(&mut self, range: ByteRange) -> BytesMut {
        let bytes = range.end().next_multiple_of(GROUP_BYTES) - range.start();
        let before = self.free.range(..=range.start()).next_back().map(|(start, _)| *start);
        let Some(start) = before else { return BytesMut::new() };
        let Some(mut stretch) = self.free.remove(&start) else { return BytesMut::new() };
        let skip = range.start() - start;
        if (stretch.capacity() as u64) < skip + bytes {
            self.free.insert(start, stretch);
            return BytesMut::new();
        }
        let mut taken = stretch.split_off(skip as usize);
        let rest = taken.split_off(bytes as usize);
        for (start, stretch) in [(start, stretch), (start + skip + bytes, rest)] {
            if stretch.capacity() > 0 {
                self.free.insert(start, stretch);
            }
        }
        taken
    }
}

impl Fetcher {
    /// Fetches `request.range` grown to whole groups.
    pub(super) async fn fetch(
        self: Arc<Self>,
        request: ReadRequest,
    ) -> Result<VerifiedRange, ReadError> {
        let (shard, range) = (request.shard, request.range);
        if range.end() > OBJECT_BYTES_MAX {
            return Err(ReadError::OutOfRange { shard, range, size: OBJECT_BYTES_MAX });
        }
        let mut read = Reading::begin(self, request)?;
        // Once more if a part came under a size that another part disproves.
        for _ in 0..2 {
            read.fill().await?;
            if let Some(joined) = read.join() {
                return Ok(joined);
            }
            read.drop_disproved();
        }
        Err(ReadError::Corrupt { shard, detail: "peers disagree about its size".into() })
    }

    /// A scheduling pass over all reads.
    fn assign(&self, now: Instant) {
        // Where this node's own limit is the brake, nobody is late.
        let hedge = !self.download.is_the_brake();
        self.shared.lock().assign(now, hedge);
    }
}

/// How a request is ended from here: at once, or with what it has proved.
struct Running {
    abort: AbortHandle,
    stop: CancellationToken,
}

/// One read under way; dropping it takes it off the schedule.
struct Reading {
    fetcher: Arc<Fetcher>,
    request: ReadRequest,
    id: ReadId,
    started: Instant,
    orders: mpsc::Receiver<Ask>,
    /// Dropping the set aborts what it runs.
    running: JoinSet<Answer>,
    handles: BTreeMap<RequestId, Running>,
    memory: Memory,
    parts: Vec<Part>,
    /// Since when nobody is asked for anything.
    idle_since: Instant,
    failures: u32,
    last: Option<(PeerId, Failure)>,
}

impl Reading {
    fn begin(fetcher: Arc<Fetcher>, request: ReadRequest) -> Result<Self, ReadError> {
        let now = Instant::now();
        // A twin for each request, and as many that ended while their order was under way.
        let (sender, orders) = mpsc::channel(4 * REQUESTS_PER_READ_MAX);
        let id = {
            let mut state = fetcher.shared.lock();
            let id = state.scheduler.add(request);
            let id = id.map_err(|error| ReadError::Overloaded(error.to_string()))?;
            state.orders.insert(id, sender);
            id
        };
        Ok(Self {
            fetcher,
            request,
            id,
            started: now,
            orders,
            running: JoinSet::new(),
            handles: BTreeMap::new(),
            memory: Memory::new(request.range),
            parts: Vec::new(),
            idle_since: now,
            failures: 0,
            last: None,
        })
    }

    /// Runs until every byte of the read was delivered.
    async fn fill(&mut self) -> Result<(), ReadError> {
        let deadline = self.request.deadline.unwrap_or(self.started + FAR);
        let mut stirred = self.fetcher.shared.stirred();
        loop {
            // Before looking, so that a change while looking is not missed.
            stirred.borrow_and_update();
            let now = Instant::now();
            self.fetcher.assign(now);
            while let Ok(ask) = self.orders.try_recv() {
                self.ask(ask);
            }
            let (done, busy, wake) = {
                let state = self.fetcher.shared.lock();
                let scheduler = &state.scheduler;
                let busy = scheduler.in_flight(self.id) > 0;
                (scheduler.is_done(self.id), busy, scheduler.wake(now, self.id))
            };
            if done {
                return Ok(());
            }
            let mut until = deadline;
            if !busy {
                let give_up = self.idle_since + self.fetcher.find_timeout;
                until = until.min(give_up);
                let (holders, next_dial) = self.call_those_away(now);
                if now >= until || self.failures >= ATTEMPTS_MAX {
                    return Err(self.gave_up(&holders));
                }
                until = next_dial.map_or(until, |next| next.min(until));
            }
            if now >= deadline {
                return Err(self.deadline_error("somebody was still sending".into()));
            }
            let until = wake.map_or(until, |wake| wake.min(until));
            tokio::select! {
                Some(ask) = self.orders.recv() => self.ask(ask),
                Some(answer) = self.running.join_next(), if !self.running.is_empty() => {
                    match answer {
                        Ok((ask, answer)) => self.on_answer(ask, answer),
                        // One that was given up for its twin; a panic is passed on.
                        Err(error) if error.is_cancelled() => {}
                        Err(error) => {
                            let what = format!("a transfer was abandoned: {error}");
                            return Err(ReadError::Overloaded(what));
                        }
                    }
                }
                // An error means that the mesh is gone: the time-out then ends the read.
                Ok(()) = stirred.changed() => {}
                () = sleep_until(until.into()) => {}
            }
            if busy {
                // It was until now.
                self.idle_since = Instant::now();
            }
        }
    }

    fn ask(&mut self, ask: Ask) {
        let decoder = {
            let mut state = self.fetcher.shared.lock();
            // Its twin may have come while the order was under way.
            if !state.scheduler.knows(self.id, ask.request) {
                return;
            }
            let decoder = RangeDecoder::new(self.memory.take(ask.range));
            state.scheduler.watch(self.id, ask.request, decoder.proved());
            decoder
        };
        let fetcher = Arc::clone(&self.fetcher);
        let request = ShardRequest {
            shard: self.request.shard,
            range: ask.range,
            priority: self.request.priority,
        };
        let may_relay = fetcher.shared.lock().may_relay(request.shard);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let abort = self.running.spawn(async move {
            let shared = Arc::clone(&fetcher.shared);
            let heard = move || {
                shared.lock().scheduler.links.heard(Instant::now(), ask.peer);
            };
            let order = Order { peer: ask.peer, request, may_relay, heard: &heard, stop: stopped };
            (ask, fetcher.client.request(order, decoder).await)
        });
        self.handles.insert(ask.request, Running { abort, stop });
    }

    fn on_answer(&mut self, ask: Ask, answer: Result<VerifiedBuf, Failure>) {
        self.handles.remove(&ask.request);
        match answer {
            Ok(piece) => self.take_in(ask, Outcome::Delivered, Some(piece)),
            Err(mut failure) => {
                let proved = failure.proved.take();
                if failure.kind == FailureKind::Stopped {
                    self.take_in(ask, Outcome::Stopped, proved);
                    return;
                }
                self.failures += 1;
                self.take_in(ask, Outcome::Failed, proved);
                self.failed(ask.peer, failure);
            }
        }
    }

    /// A request ended with these groups proved: keeps what the schedule wants of them.
    fn take_in(&mut self, ask: Ask, outcome: Outcome, piece: Option<VerifiedBuf>) {
        let now = Instant::now();
        let mut state = self.fetcher.shared.lock();
        // What a peer that was banned meanwhile did not finish is not worth keeping.
        let whole = outcome == Outcome::Delivered;
        let piece = piece.filter(|_| whole || !state.reputation.is_shunned(now, ask.peer));
        let proved = piece.as_ref().map_or(0, |piece| piece.range().end());
        // Given up for its twin in the very moment it ended: not counted, not kept.
        let ended = state.scheduler.end(now, self.id, ask.request, outcome, proved);
        let Some(Ended { keep, beaten }) = ended else { return };
        let kept = keep.zip(piece).and_then(|(keep, piece)| {
            // The last group of a request comes whole, though less of it was asked for.
            if keep.end() < ask.range.end() { piece.cut(keep.end()) } else { Some(piece) }
        });
        if let Some(piece) = &kept {
            let bytes = piece.range().len();
            state.counts.verified_bytes += bytes;
            state.traffic(ask.peer).bytes_in += bytes;
            if whole {
                state.note(now, ask.peer, Conduct::Delivered);
            }
        }
        if let Some(beaten) = beaten {
            state.counts.hedges += 1;
            if beaten.silent {
                state.note(now, beaten.peer, Conduct::Stalled);
            }
            // One that is not there yet has an order under way, which comes to nothing.
            match self.handles.get(&beaten.request) {
                Some(running) if beaten.wanted => running.stop.cancel(),
                Some(running) => running.abort.abort(),
                None => {}
            }
            if !beaten.wanted {
                self.handles.remove(&beaten.request);
            }
        }
        drop(state);
        if let Some(piece) = kept {
            self.parts.push(Part { peer: ask.peer, piece });
            self.failures = 0;
            self.fetcher.shared.ring();
        }
    }

    /// Dials holders that are not connected; who is known, and when to dial again.
    fn call_those_away(&self, now: Instant) -> (Holders, Option<Instant>) {
        let mut state = self.fetcher.shared.lock();
        let holders = state.holders(now, self.request.shard);
        for (peer, addresses) in state.take_dials(now, holders.away.iter().map(|(peer, _)| *peer)) {
            // A full command queue: tried again at the next dial time.
            let _ = self.fetcher.swarm.dial(peer, addresses);
        }
        let next = state.next_dial(&holders.away).filter(|next| *next > now);
        (holders, next)
    }

    /// The parts in order as one, unless they contradict each other.
    fn join(&mut self) -> Option<VerifiedRange> {
        self.parts.sort_by_key(|part| part.piece.range().start());
        let parts = std::mem::take(&mut self.parts);
        let (peers, pieces): (Vec<PeerId>, Vec<VerifiedBuf>) =
            parts.into_iter().map(|part| (part.peer, part.piece)).unzip();
        match VerifiedBuf::join(pieces) {
            Ok(whole) => Some(whole),
            Err(pieces) => {
                let parts = peers.into_iter().zip(pieces);
                self.parts = parts.map(|(peer, piece)| Part { peer, piece }).collect();
                None
            }
        }
    }

    /// A part that reaches the object's end proves its size. Whoever sent another part
    /// under another size lied about it: banned, and the part is dropped.
    fn drop_disproved(&mut self) {
        let proved = self.parts.iter().find(|part| part.piece.proves_size());
        let Some(size) = proved.map(|part| part.piece.size()) else { return };
        let all = std::mem::take(&mut self.parts);
        let (kept, disproved): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|part| part.piece.size() == size);
        self.parts = kept;
        for Part { peer, piece } in disproved {
            let (range, now) = (piece.range(), Instant::now());
            let known = {
                let mut state = self.fetcher.shared.lock();
                state.scheduler.put_back(self.id, range);
                let known = state.reputation.is_banned(now, peer);
                if known {
                    state.counts.rejected_bytes += range.len();
                    state.traffic(peer).rejected += range.len();
                }
                known
            };
            // One lie, however many of its parts are here.
            if !known {
                let kind = FailureKind::Wrong;
                let detail = format!("said {} bytes of an object of {size}", piece.size());
                self.failed(peer, Failure { kind, bytes: range.len(), detail, proved: None });
            }
        }
    }

    /// Draws the consequences of a failure for the peer.
    fn failed(&mut self, peer: PeerId, failure: Failure) {
        let now = Instant::now();
        let shard = self.request.shard;
        let ban = {
            let mut state = self.fetcher.shared.lock();
            if failure.kind == FailureKind::NotFound {
                state.membership.retract(peer, shard);
            }
            if failure.kind == FailureKind::Wrong {
                state.counts.rejected_bytes += failure.bytes;
                state.traffic(peer).rejected += failure.bytes;
            }
            failure.kind.conduct().and_then(|conduct| state.note(now, peer, conduct))
        };
        if let Some(until) = ban {
            warn!(%peer, shard = %shard.short(), detail = %failure.detail, "sent wrong bytes; banned");
            self.fetcher.client.forget(peer);
            // A full command queue leaves it connected, but it is not chosen any more.
            let _ = self.fetcher.swarm.ban(peer, until);
        } else {
            debug!(%peer, shard = %shard.short(), detail = %failure.detail, "asking another");
        }
        self.last = Some((peer, failure));
        self.fetcher.shared.ring();
    }

    /// The error of a read for which nobody was left to ask.
    fn gave_up(&self, holders: &Holders) -> ReadError {
        let (shard, waited) = (self.request.shard, self.started.elapsed());
        let known = holders.ready.len() + holders.away.len();
        let relayed = holders.relayed.len();
        match &self.last {
            _ if known == 0 && relayed > 0 => {
                self.deadline_error(format!("each holder ({relayed}) {RELAYED}"))
            }
            None if known == 0 => ReadError::NotFound { shard, waited },
            None => {
                let (ready, away) = (holders.ready.len(), holders.away.len());
                self.deadline_error(format!("{ready} holders are busy, {away} cannot be reached"))
            }
            Some((peer, failure)) => match failure.kind {
                FailureKind::Wrong => {
                    let detail = format!("{peer}: {}; no other holder is left", failure.detail);
                    ReadError::Corrupt { shard, detail }
                }
                FailureKind::OutOfRange { object_size } => {
                    let range = self.request.range;
                    ReadError::OutOfRange { shard, range, size: object_size }
                }
                FailureKind::NotFound if known == 0 => ReadError::NotFound { shard, waited },
                _ => self.deadline_error(format!(
                    "{known} holders known; the last asked, {peer}, {}",
                    failure.detail
                )),
            },
        }
    }

    fn deadline_error(&self, detail: String) -> ReadError {
        let waited = self.started.elapsed();
        ReadError::Deadline { shard: self.request.shard, waited, detail }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let now = Instant::now();
        {
            let mut state = self.fetcher.shared.lock();
            state.scheduler.remove(now, self.id);
            state.orders.remove(&self.id);
        }
        // Its places are others' now.
        self.fetcher.assign(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_out_once_and_joins_again() {
        let range = |start, end| ByteRange::new(start * GROUP_BYTES, end * GROUP_BYTES).unwrap();
        let end = 9 * GROUP_BYTES + 5;
        let whole = ByteRange::new(GROUP_BYTES + 7, end).unwrap();
        let mut memory = Memory::new(whole);
        let order = [range(4, 6), range(1, 4), ByteRange::new(6 * GROUP_BYTES, end).unwrap()];
        let mut taken: Vec<BytesMut> = order.iter().map(|range| memory.take(*range)).collect();
        let groups: Vec<usize> =
            taken.iter().map(|b| b.capacity() / GROUP_BYTES as usize).collect();
        assert_eq!(groups, [2, 3, 4]);
        assert!(memory.free.is_empty());
        assert_eq!(memory.take(range(4, 6)).capacity(), 0, "it is in use");
        for (value, buffer) in taken.iter_mut().enumerate() {
            buffer.resize(buffer.capacity(), value as u8);
        }
        let first = taken[1].as_ptr();
        let mut joined = taken.remove(1);
        for next in taken {
            joined.unsplit(next);
        }
        assert_eq!(joined.as_ptr(), first);
        assert_eq!(joined.len(), 9 * GROUP_BYTES as usize);
        let values = [1, 4, 6].map(|group: usize| joined[(group - 1) * GROUP_BYTES as usize]);
        assert_eq!(values, [1, 0, 2]);
    }
}
