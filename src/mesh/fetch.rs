//! One read from peers: asks whom the scheduler says, proves what comes, and goes
//! on until it is there or nobody is left to wait for.
//!
//! Invariants: it never polls: it waits for its orders, for who holds what to
//! change, for an answer or a time; dropping the read ends its requests and gives
//! back their place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_swarm::{PeerId, SwarmHandle};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep_until;
use tracing::{debug, warn};

use super::limiter::Limiter;
use super::options::{ATTEMPTS_MAX, REQUESTS_PER_READ_MAX};
use super::reputation::Conduct;
use super::scheduler::{Ask, Outcome, ReadId, RequestId};
use super::shard_client::{Client, Failure, FailureKind};
use super::state::{Holders, Shared};
use crate::store::verified::{OBJECT_BYTES_MAX, VerifiedRange};
use crate::store::{ReadError, ReadRequest};
use crate::wire::ShardRequest;

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
    range: VerifiedRange,
}

/// What a request's task brings home.
type Answer = (Ask, Result<VerifiedRange, Failure>);

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

/// One read under way; dropping it takes it off the schedule.
struct Reading {
    fetcher: Arc<Fetcher>,
    request: ReadRequest,
    id: ReadId,
    started: Instant,
    orders: mpsc::Receiver<Ask>,
    /// Dropping the set aborts what it runs.
    running: JoinSet<Answer>,
    handles: BTreeMap<RequestId, AbortHandle>,
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
            if busy {
                self.idle_since = now;
            } else {
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
        }
    }

    fn ask(&mut self, ask: Ask) {
        let fetcher = Arc::clone(&self.fetcher);
        let wire = ShardRequest {
            shard: self.request.shard,
            range: ask.range,
            priority: self.request.priority,
        };
        let handle = self.running.spawn(async move {
            let shared = Arc::clone(&fetcher.shared);
            let heard = move || {
                shared.lock().scheduler.links.heard(Instant::now(), ask.peer);
            };
            (ask, fetcher.client.request(ask.peer, wire, &heard).await)
        });
        self.handles.insert(ask.request, handle);
    }

    fn on_answer(&mut self, ask: Ask, answer: Result<VerifiedRange, Failure>) {
        self.handles.remove(&ask.request);
        match answer {
            Ok(range) => self.delivered(ask, range),
            Err(failure) => {
                let now = Instant::now();
                let mut state = self.fetcher.shared.lock();
                let beaten = state.scheduler.end(now, self.id, ask.request, Outcome::Failed);
                debug_assert!(beaten.is_none());
                drop(state);
                self.failures += 1;
                self.failed(ask.peer, failure);
            }
        }
    }

    fn delivered(&mut self, ask: Ask, range: VerifiedRange) {
        let now = Instant::now();
        let bytes = range.bytes().len() as u64;
        let beaten = {
            let mut state = self.fetcher.shared.lock();
            // Given up for its twin in the very moment it ended: not counted, not kept.
            let known = state.scheduler.knows(self.id, ask.request);
            if !known {
                return;
            }
            let outcome = Outcome::Delivered(bytes);
            let beaten = state.scheduler.end(now, self.id, ask.request, outcome);
            state.counts.verified_bytes += bytes;
            state.traffic(ask.peer).bytes_in += bytes;
            state.note(now, ask.peer, Conduct::Delivered);
            if let Some(beaten) = beaten {
                state.counts.hedges += 1;
                if beaten.silent {
                    state.note(now, beaten.peer, Conduct::Stalled);
                }
            }
            beaten
        };
        if let Some(handle) = beaten.and_then(|beaten| self.handles.remove(&beaten.request)) {
            handle.abort();
        }
        self.parts.push(Part { peer: ask.peer, range });
        self.failures = 0;
        self.fetcher.shared.ring();
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
        self.parts.sort_by_key(|part| part.range.range().start());
        let parts: Vec<VerifiedRange> = self.parts.iter().map(|part| part.range.clone()).collect();
        VerifiedRange::join(&parts)
    }

    /// A part that reaches the object's end proves its size. Whoever sent another part
    /// under another size lied about it: banned, and the part is dropped.
    fn drop_disproved(&mut self) {
        let proved = self.parts.iter().find(|part| part.range.proves_size());
        let Some(size) = proved.map(|part| part.range.size()) else { return };
        let (kept, disproved) =
            std::mem::take(&mut self.parts).into_iter().partition(|part| part.range.size() == size);
        self.parts = kept;
        let disproved: Vec<Part> = disproved;
        for Part { peer, range } in disproved {
            let failure = Failure {
                kind: FailureKind::Wrong,
                bytes: range.range().len(),
                detail: format!("said {} bytes of an object of {size}", range.size()),
            };
            self.fetcher.shared.lock().scheduler.put_back(self.id, range.range());
            self.failed(peer, failure);
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
        match &self.last {
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
