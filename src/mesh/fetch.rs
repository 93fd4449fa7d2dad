//! One read from peers: find holders, split, ask, and ask others until it is
//! there or nobody is left to wait for.
//!
//! Invariants: it never polls: it waits for the state's bell, a peer's answer
//! or a time at which it gives up; dropping the read ends its requests and gives
//! back their place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_swarm::{PeerId, SwarmHandle};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout_at};
use tracing::{debug, warn};

use super::options::{ATTEMPTS_MAX, PIECES_AT_ONCE, RETRY_FIRST, RETRY_MAX};
use super::picker::{Begun, split};
use super::shard_client::{Client, Failure, FailureKind};
use super::state::{Holders, Shared};
use crate::store::verified::{GROUP_BYTES, OBJECT_BYTES_MAX, VerifiedRange};
use crate::store::{ByteRange, ReadError, ReadRequest};
use crate::wire::ShardRequest;

/// What every read needs; shared by all of them.
pub(super) struct Fetcher {
    pub(super) shared: Arc<Shared>,
    pub(super) swarm: SwarmHandle,
    pub(super) client: Client,
    pub(super) find_timeout: Duration,
}

/// A deadline beyond any: used where the caller has none.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// A proved piece, and who sent it.
#[derive(Clone)]
struct Part {
    peer: PeerId,
    range: VerifiedRange,
}

/// A peer that failed this piece: asked again only after a while.
struct Failed {
    retry: Instant,
    wait: Duration,
}

/// Where the search for a peer to ask stands.
enum Search {
    Ask(Ticket),
    Wait { holders: Holders, until: Option<Instant> },
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
        let holders = self.shared.lock().holders(Instant::now(), shard).ready.len();
        let pieces = split(range, holders);
        let mut parts = vec![None; pieces.len()];
        // Once more if a part came under a size that another part disproves.
        for _ in 0..2 {
            self.fill(&request, &pieces, &mut parts).await?;
            let whole: Vec<VerifiedRange> =
                parts.iter().flatten().map(|part: &Part| part.range.clone()).collect();
            if let Some(joined) = VerifiedRange::join(&whole) {
                return Ok(joined);
            }
            self.drop_disproved(&request, &mut parts);
        }
        Err(ReadError::Corrupt { shard, detail: "peers disagree about its size".into() })
    }

    /// Fetches the parts that are missing, several at once.
    async fn fill(
        self: &Arc<Self>,
        request: &ReadRequest,
        pieces: &[ByteRange],
        parts: &mut [Option<Part>],
    ) -> Result<(), ReadError> {
        let missing: Vec<usize> = (0..parts.len()).filter(|at| parts[*at].is_none()).collect();
        let mut missing = missing.into_iter();
        // Dropping the set aborts what it runs.
        let mut running = JoinSet::new();
        loop {
            while running.len() < PIECES_AT_ONCE {
                let Some(at) = missing.next() else { break };
                let this = self.clone();
                let request = ReadRequest { range: pieces[at], ..*request };
                running.spawn(async move { (at, this.piece(request).await) });
            }
            let Some(done) = running.join_next().await else { return Ok(()) };
            let (at, part) = done.map_err(|error| {
                ReadError::Overloaded(format!("a transfer was abandoned: {error}"))
            })?;
            parts[at] = Some(part?);
        }
    }

    /// A part that reaches the object's end proves its size. Whoever sent another part
    /// under another size lied about it: banned, and the part is dropped.
    fn drop_disproved(&self, request: &ReadRequest, parts: &mut [Option<Part>]) {
        let proved = parts.iter().flatten().find(|part| part.range.proves_size());
        let Some(size) = proved.map(|part| part.range.size()) else { return };
        for part in parts {
            if let Some(Part { peer, range }) = part
                && range.size() != size
            {
                let failure = Failure {
                    kind: FailureKind::Wrong,
                    bytes: range.range().len(),
                    detail: format!("said {} bytes of an object of {size}", range.size()),
                };
                self.failed(*peer, request, &failure, &mut BTreeMap::new());
                *part = None;
            }
        }
    }

    /// Fetches a range that fits one wire request.
    async fn piece(&self, request: ReadRequest) -> Result<Part, ReadError> {
        let started = Instant::now();
        let deadline = request.deadline.unwrap_or(started + FAR);
        let mut changed = self.shared.changed();
        let mut failed = BTreeMap::new();
        let mut last: Option<(PeerId, Failure)> = None;
        for _ in 0..ATTEMPTS_MAX {
            let give_up = deadline.min(Instant::now() + self.find_timeout);
            let found = self.find(&request, &failed, &mut changed, give_up).await;
            let ticket = match found {
                Ok(ticket) => ticket,
                Err(holders) => return Err(gave_up(&request, started, &holders, last)),
            };
            let peer = ticket.begun.peer;
            let wire = ShardRequest {
                shard: request.shard,
                range: request.range,
                priority: request.priority,
            };
            let answer = timeout_at(deadline.into(), self.client.request(peer, wire)).await;
            match answer {
                Ok(Ok(range)) => {
                    ticket.delivered(range.bytes().len() as u64);
                    return Ok(Part { peer, range });
                }
                Ok(Err(failure)) => {
                    drop(ticket);
                    self.failed(peer, &request, &failure, &mut failed);
                    last = Some((peer, failure));
                }
                Err(_) => {
                    drop(ticket);
                    let detail = format!("{peer} was still sending");
                    return Err(deadline_error(&request, started, detail));
                }
            }
        }
        let holders = self.shared.lock().holders(Instant::now(), request.shard);
        Err(gave_up(&request, started, &holders, last))
    }

    /// Waits until there is a peer to ask; the holders known if there is none by `give_up`.
    async fn find(
        &self,
        request: &ReadRequest,
        failed: &BTreeMap<PeerId, Failed>,
        changed: &mut watch::Receiver<u64>,
        give_up: Instant,
    ) -> Result<Ticket, Holders> {
        loop {
            // Before looking, so that a change while looking is not missed.
            changed.borrow_and_update();
            let now = Instant::now();
            let (holders, until) = match self.search(now, request, failed) {
                Search::Ask(ticket) => return Ok(ticket),
                Search::Wait { holders, until } => (holders, until),
            };
            if now >= give_up {
                return Err(holders);
            }
            let wake = until.map_or(give_up, |until| until.min(give_up));
            tokio::select! {
                // An error means that the mesh is gone: the time-out then ends the search.
                Ok(()) = changed.changed() => {}
                () = sleep_until(wake.into()) => {}
            }
        }
    }

    fn search(
        &self,
        now: Instant,
        request: &ReadRequest,
        failed: &BTreeMap<PeerId, Failed>,
    ) -> Search {
        let mut state = self.shared.lock();
        let holders = state.holders(now, request.shard);
        let may_ask = |peer: &&PeerId| failed.get(peer).is_none_or(|failed| failed.retry <= now);
        let candidates: Vec<PeerId> = holders.ready.iter().filter(may_ask).copied().collect();
        let len = request.range.len();
        if let Some(begun) = state.begin(&candidates, len, salt(request)) {
            let shared = self.shared.clone();
            return Search::Ask(Ticket { begun, shared, started: now, delivered: 0 });
        }
        let mut until = None;
        if candidates.is_empty() {
            // Nobody to ask now: those who are away are called, those who failed come round.
            for (peer, addresses) in state.take_dials(now, &holders.away) {
                // A full command queue: tried again at the next dial time.
                let _ = self.swarm.dial(peer, addresses);
            }
            let retries = holders.ready.iter().filter_map(|peer| failed.get(peer));
            let retry = retries.map(|failed| failed.retry).min();
            until = [retry, state.next_dial(&holders.away)].into_iter().flatten().min();
        }
        Search::Wait { holders, until }
    }

    /// Draws the consequences of a failure: for the peer, and for this piece.
    fn failed(
        &self,
        peer: PeerId,
        request: &ReadRequest,
        failure: &Failure,
        failed: &mut BTreeMap<PeerId, Failed>,
    ) {
        let now = Instant::now();
        let shard = request.shard;
        let ban = {
            let mut state = self.shared.lock();
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
            self.client.forget(peer);
            // A full command queue leaves it connected, but it is not chosen any more.
            let _ = self.swarm.ban(peer, until);
        } else {
            debug!(%peer, shard = %shard.short(), range = %request.range, detail = %failure.detail, "asking another");
        }
        let entry = failed.entry(peer).or_insert(Failed { retry: now, wait: RETRY_FIRST });
        entry.retry = now + entry.wait;
        entry.wait = (entry.wait * 2).min(RETRY_MAX);
        self.shared.ring();
    }
}

/// Distinguishes ranges, so that they spread over equal peers.
fn salt(request: &ReadRequest) -> u64 {
    let bytes = request.shard.as_bytes();
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(first) ^ (request.range.start() / GROUP_BYTES)
}

/// The error of a piece for which nobody was left to ask.
fn gave_up(
    request: &ReadRequest,
    started: Instant,
    holders: &Holders,
    last: Option<(PeerId, Failure)>,
) -> ReadError {
    let (shard, waited) = (request.shard, started.elapsed());
    let known = holders.ready.len() + holders.away.len();
    match last {
        None if known == 0 => ReadError::NotFound { shard, waited },
        None => {
            let (ready, away) = (holders.ready.len(), holders.away.len());
            let detail = format!("{ready} holders are busy, {away} cannot be reached");
            deadline_error(request, started, detail)
        }
        Some((peer, failure)) => match failure.kind {
            FailureKind::Wrong => {
                let detail = format!("{peer}: {}; no other holder is left", failure.detail);
                ReadError::Corrupt { shard, detail }
            }
            FailureKind::OutOfRange { object_size } => {
                ReadError::OutOfRange { shard, range: request.range, size: object_size }
            }
            FailureKind::NotFound if known == 0 => ReadError::NotFound { shard, waited },
            _ => {
                let detail =
                    format!("{known} holders known; the last asked, {peer}, {}", failure.detail);
                deadline_error(request, started, detail)
            }
        },
    }
}

fn deadline_error(request: &ReadRequest, started: Instant, detail: String) -> ReadError {
    ReadError::Deadline { shard: request.shard, waited: started.elapsed(), detail }
}

/// A request under way; dropping it gives its place back.
struct Ticket {
    begun: Begun,
    shared: Arc<Shared>,
    started: Instant,
    delivered: u64,
}

impl Ticket {
    fn delivered(mut self, bytes: u64) {
        self.delivered = bytes;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.picker.end(self.begun, self.delivered, self.started.elapsed());
            if self.delivered > 0 {
                state.counts.verified_bytes += self.delivered;
                state.traffic(self.begun.peer).bytes_in += self.delivered;
                state.note(Instant::now(), self.begun.peer, super::reputation::Conduct::Delivered);
            }
        }
        self.shared.ring();
    }
}
