//! The course of a read: when it is examined, when it is complete, when it fails, and what an
//! answer means for the peer that sent it.
//!
//! Invariants: a read is examined whenever something that concerns it changes, and at `look` at the
//! latest. What a request proved before it broke off is kept, unless its peer lied.

use std::time::{Duration, Instant};

use doppler_ids::{ByteRange, PeerId, ShardId};
use doppler_store::verified::OBJECT_BYTES_MAX;
use doppler_store::{Priority, ReadError, ReadRequest};

use super::answer::{Answer, Failure, FailureKind, Proved};
use super::limits::{ATTEMPTS_MAX, BUSY_MAX};
use super::reputation::Conduct;
use super::scheduler::{Beaten, Ended, Holder, Outcome};
use super::{Action, Core, Holders, ReadId, RequestId, Sight, may_relay};

/// A deadline later than any other, for callers that have none.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// The text for a peer that is reachable only through a relay.
pub const RELAYED: &str = "is reached only through a relay, which carries no shards";

/// A part that a request brought and the read keeps.
struct Part {
    request: RequestId,
    peer: PeerId,
    range: ByteRange,
    /// The object's size according to the peer.
    size: u64,
}

/// One read in flight.
pub(super) struct Reading {
    pub(super) request: ReadRequest,
    started: Instant,
    /// Since when no peer has been asked for anything.
    idle_since: Instant,
    /// When some of it was last proved; at first, when it began.
    proved_at: Instant,
    /// Failed requests since the last one that brought something.
    failures: u32,
    last: Option<(PeerId, Failure)>,
    parts: Vec<Part>,
    /// Whether parts were dropped because another part disproved the size that they came with.
    was_disputed: bool,
    /// When it is examined if nothing happens before.
    look: Instant,
}

impl Reading {
    pub(super) fn is_for_token(&self) -> bool {
        self.request.priority == Priority::Token
    }

    const fn new(now: Instant, request: ReadRequest) -> Self {
        Self {
            request,
            started: now,
            idle_since: now,
            proved_at: now,
            failures: 0,
            last: None,
            parts: Vec::new(),
            was_disputed: false,
            look: now,
        }
    }

    fn deadline(&self) -> Instant {
        self.request.deadline.unwrap_or(self.started + FAR)
    }

    fn late(&self, now: Instant, detail: String) -> ReadError {
        let waited = now.saturating_duration_since(self.started);
        ReadError::Deadline { shard: self.request.shard, waited, detail }
    }

    /// The error of a read for which no peer is left to ask.
    fn gave_up(&self, now: Instant, holders: &Holders) -> ReadError {
        let shard = self.request.shard;
        let waited = now.saturating_duration_since(self.started);
        let known = holders.ready.len() + holders.away.len();
        let relayed = holders.relayed.len();
        match &self.last {
            _ if known == 0 && relayed > 0 => {
                self.late(now, format!("each holder ({relayed}) {RELAYED}"))
            }
            None if known == 0 => ReadError::NotFound { shard, waited },
            None => {
                let (ready, away) = (holders.ready.len(), holders.away.len());
                let are = if ready == 1 { "holder is" } else { "holders are" };
                self.late(now, format!("{ready} {are} busy, {away} cannot be reached"))
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
                _ => {
                    let detail = &failure.detail;
                    let holders = if known == 1 { "holder" } else { "holders" };
                    self.late(
                        now,
                        format!("{known} {holders} known; the last asked, {peer}, {detail}"),
                    )
                }
            },
        }
    }
}

impl Core {
    pub(super) fn on_read(
        &mut self,
        now: Instant,
        read: ReadId,
        request: ReadRequest,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let (shard, range) = (request.shard, request.range);
        if range.end() > OBJECT_BYTES_MAX {
            let error = ReadError::OutOfRange { shard, range, size: OBJECT_BYTES_MAX };
            out.push(Action::End { read, result: Err(error) });
            return;
        }
        if let Err(error) = self.scheduler.add(read, request) {
            let error = ReadError::Overloaded(error.to_string());
            out.push(Action::End { read, result: Err(error) });
            return;
        }
        self.reads.insert(read, Reading::new(now, request));
        if request.priority != Priority::Bulk {
            self.heat.read(now, shard);
        }
        self.topics_read(now, shard);
        out.push(Action::Changed);
        self.settle(now, false, sight, out);
    }

    pub(super) fn on_dropped(
        &mut self,
        now: Instant,
        read: ReadId,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        if self.reads.remove(&read).is_some() {
            self.scheduler.remove(now, read);
            out.push(Action::Changed);
            // Its room is free for others now.
            self.settle(now, false, sight, out);
        }
    }

    pub(super) fn on_answered(
        &mut self,
        now: Instant,
        (read, request, peer): (ReadId, RequestId, PeerId),
        answer: Answer,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let Answer { outcome, proved } = answer;
        let ended = match &outcome {
            Ok(()) => Outcome::Delivered,
            Err(failure) if failure.kind == FailureKind::Stopped => Outcome::Stopped,
            Err(_) => Outcome::Failed,
        };
        if let Some(reading) = self.reads.get_mut(&read) {
            // A peer that says it is busy counts as late.
            let is_busy =
                outcome.as_ref().is_err_and(|failure| failure.kind == FailureKind::Overloaded);
            reading.failures += u32::from(ended == Outcome::Failed && !is_busy);
            (reading.idle_since, reading.look) = (now, now);
        }
        self.take_in(now, (read, request, peer), ended, proved, sight, out);
        let mut stirred = false;
        if let Err(failure) = outcome
            && ended == Outcome::Failed
        {
            stirred = matches!(failure.kind, FailureKind::NotFound | FailureKind::Wrong);
            self.failed(now, read, peer, failure, out);
        }
        self.settle(now, stirred, sight, out);
    }

    /// Handles a request that ended with this proved: keeps what the scheduler wants of it.
    fn take_in(
        &mut self,
        now: Instant,
        (read, request, peer): (ReadId, RequestId, PeerId),
        outcome: Outcome,
        proved: Option<Proved>,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        // An unfinished answer of a peer that was banned meanwhile is not kept.
        let is_whole = outcome == Outcome::Delivered;
        let proved = proved.filter(|_| is_whole || !self.reputation.is_shunned(now, peer));
        let end = proved.map_or(0, |proved| proved.end);
        let seen = |request| sight.proved(read, request);
        // It was cancelled in favour of its twin just when it ended: neither counted nor kept.
        let ended = self.scheduler.end(now, read, request, outcome, end, &seen);
        let Some(Ended { keep, beaten }) = ended else { return };
        if let Some((keep, proved)) = keep.zip(proved) {
            self.keep(now, (read, request, peer), is_whole, keep, proved, out);
        }
        if let Some(Beaten { request, peer, is_silent, is_wanted }) = beaten {
            self.counts.hedges += 1;
            if is_silent {
                self.note(now, peer, Conduct::Stalled);
            }
            out.push(match is_wanted {
                true => Action::Stop { read, request },
                false => Action::Abandon { read, request },
            });
        }
    }

    fn keep(
        &mut self,
        now: Instant,
        (read, request, peer): (ReadId, RequestId, PeerId),
        is_whole: bool,
        keep: ByteRange,
        proved: Proved,
        out: &mut Vec<Action>,
    ) {
        let Some(reading) = self.reads.get_mut(&read) else { return };
        // The read's last group arrives in full, even if only a part was asked for.
        let is_last = keep.end() >= reading.request.range.end();
        let end = if is_last { proved.end } else { keep.end() };
        let Some(range) = ByteRange::new(keep.start(), end) else { return };
        reading.parts.push(Part { request, peer, range, size: proved.size });
        (reading.failures, reading.proved_at) = (0, now);
        self.counts.verified_bytes += range.len();
        self.traffic_of(peer).bytes_in += range.len();
        if is_whole {
            self.note(now, peer, Conduct::Delivered);
        }
        out.extend([Action::Keep { read, request, end }, Action::Changed]);
    }

    /// Records the consequences of a failure for the peer.
    fn failed(
        &mut self,
        now: Instant,
        read: ReadId,
        peer: PeerId,
        failure: Failure,
        out: &mut Vec<Action>,
    ) {
        let Some(shard) = self.reads.get(&read).map(|reading| reading.request.shard) else {
            return;
        };
        if failure.kind == FailureKind::NotFound {
            self.membership.retract(peer, shard);
        }
        if failure.kind == FailureKind::Wrong {
            self.counts.rejected_bytes += failure.bytes;
            self.traffic_of(peer).rejected += failure.bytes;
        }
        let ban = failure.kind.conduct().and_then(|conduct| self.note(now, peer, conduct));
        if let Some(until) = ban {
            let detail = failure.detail.clone();
            out.push(Action::Ban { peer, until, shard, detail });
        }
        if let Some(reading) = self.reads.get_mut(&read) {
            reading.last = Some((peer, failure));
        }
        out.push(Action::Changed);
    }

    /// Gives work to peers that have room, and examines the reads that this or the time affects;
    /// all reads if holdings may have changed (`stirred`).
    pub(super) fn settle(
        &mut self,
        now: Instant,
        stirred: bool,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let mut all = stirred;
        // Terminates: each further round has ended a read, or disputed one for the first time.
        loop {
            self.assign(now, sight, out);
            let due = self.reads.iter().filter(|(_, reading)| all || reading.look <= now);
            let due: Vec<ReadId> = due.map(|(read, _)| *read).collect();
            let again =
                due.into_iter().fold(false, |again, read| self.look(now, read, out) | again);
            all = false;
            if !again {
                break;
            }
        }
        let wakes = self.reads.iter().map(|(read, reading)| {
            let wake = self.scheduler.wake(now, *read);
            wake.map_or(reading.look, |wake| wake.min(reading.look))
        });
        self.reads_wake = wakes.min();
    }

    /// A scheduling pass over all reads.
    fn assign(&mut self, now: Instant, sight: &dyn Sight, out: &mut Vec<Action>) {
        if self.reads.is_empty() {
            return;
        }
        let Self { scheduler, membership, reputation, contacts, announcements, .. } = self;
        // If this node's own limit sets the pace, no peer is late.
        let hedge = !sight.is_throttled(now);
        let holders = |shard: ShardId| {
            let holders = membership.holders(now, shard).into_iter();
            let relay = may_relay(announcements, shard);
            let in_reach = |peer: &PeerId| {
                contacts.get(peer).is_some_and(|contact| relay || contact.is_direct)
            };
            holders
                .filter(|(peer, _)| in_reach(peer) && !reputation.is_shunned(now, *peer))
                .map(|(peer, chunks)| Holder { peer, chunks, score: reputation.score(peer) })
                .collect()
        };
        let asks =
            scheduler.schedule(now, hedge, &holders, &|read, request| sight.proved(read, request));
        for ask in asks {
            let shard = self.reads.get(&ask.read).map(|reading| reading.request.shard);
            let may_relay = shard.is_some_and(|shard| self.may_relay(shard));
            out.push(Action::Ask { ask, may_relay });
        }
    }

    /// Ends a read that is complete or late, dials for a read for which no peer is asked, and sets
    /// when to look again. True if others may have room now or there is more to do.
    fn look(&mut self, now: Instant, read: ReadId, out: &mut Vec<Action>) -> bool {
        if self.scheduler.is_done(read) {
            return self.finish(now, read, out);
        }
        let Some(reading) = self.reads.get(&read) else { return false };
        let deadline = reading.deadline();
        if self.scheduler.in_flight(read) > 0 {
            if now >= deadline {
                let error = reading.late(now, "a peer was still sending".into());
                return self.end(now, read, Err(error), out);
            }
            return self.look_again(read, deadline);
        }
        let (shard, failures) = (reading.request.shard, reading.failures);
        let holders = self.holders(now, shard);
        let Some(until) = self.patience(now, read, deadline, &holders) else { return false };
        let away = || holders.away.iter().map(|(peer, _)| *peer);
        self.dial(now, away().collect(), out);
        if now >= until || failures >= ATTEMPTS_MAX {
            let gave_up = self.reads.get(&read).map(|reading| reading.gave_up(now, &holders));
            return gave_up.is_some_and(|error| self.end(now, read, Err(error), out));
        }
        let next_dial = self.known.next_of(now, away());
        self.look_again(read, next_dial.map_or(until, |next| next.min(until)))
    }

    /// When a read that is asked of nobody is given up. A holder that owes this node other answers
    /// is busy, and this read's turn will come; if the holder sends nothing, the reads of those
    /// answers notice it. A holder that only says it is busy is believed for a while.
    fn patience(
        &self,
        now: Instant,
        read: ReadId,
        deadline: Instant,
        holders: &Holders,
    ) -> Option<Instant> {
        let reading = self.reads.get(&read)?;
        let links = &self.scheduler.links;
        let ready = || holders.ready.iter().map(|(peer, _)| *peer);
        let heard = |peer| if links.requests(peer) > 0 { Some(now) } else { links.heard_at(peer) };
        let heard = ready().filter_map(heard).max();
        let delivered = ready().filter_map(|peer| links.delivered_at(peer)).max();
        let idle = heard.map_or(reading.idle_since, |heard| heard.max(reading.idle_since));
        let proved = delivered.map_or(reading.proved_at, |at| at.max(reading.proved_at));
        let find = self.config.find_timeout;
        Some(deadline.min(idle + find).min(proved + BUSY_MAX.max(find)))
    }

    fn look_again(&mut self, read: ReadId, at: Instant) -> bool {
        if let Some(reading) = self.reads.get_mut(&read) {
            reading.look = at;
        }
        false
    }

    /// Ends a read that was delivered in full, unless its parts disagree about the object's size. A
    /// part that reaches the object's end proves its size. A peer that sent a part with another
    /// size lied: it is banned, and the part is fetched again, once.
    fn finish(&mut self, now: Instant, read: ReadId, out: &mut Vec<Action>) -> bool {
        let Some(reading) = self.reads.get_mut(&read) else { return false };
        reading.parts.sort_by_key(|part| part.range.start());
        if reading.parts.windows(2).all(|pair| pair[0].size == pair[1].size) {
            return self.end(now, read, Ok(()), out);
        }
        let proved = reading.parts.iter().find(|part| part.range.end() == part.size);
        let size = match proved {
            Some(part) if !reading.was_disputed => part.size,
            _ => {
                let (shard, detail) = (reading.request.shard, "peers disagree about its size");
                let error = ReadError::Corrupt { shard, detail: detail.into() };
                return self.end(now, read, Err(error), out);
            }
        };
        (reading.was_disputed, reading.look) = (true, now);
        let all = std::mem::take(&mut reading.parts).into_iter();
        let (kept, disproved): (Vec<_>, Vec<_>) = all.partition(|part| part.size == size);
        reading.parts = kept;
        for Part { request, peer, range, size: said } in disproved {
            self.scheduler.put_back(read, range);
            out.push(Action::Discard { read, request });
            // It counts as one lie, however many of its parts are here.
            if self.reputation.is_banned(now, peer) {
                self.counts.rejected_bytes += range.len();
                self.traffic_of(peer).rejected += range.len();
            } else {
                let detail = format!("said {said} bytes of an object of {size}");
                let failure = Failure { kind: FailureKind::Wrong, bytes: range.len(), detail };
                self.failed(now, read, peer, failure, out);
            }
        }
        true
    }

    /// True if it cancelled requests, so that others may have room.
    fn end(
        &mut self,
        now: Instant,
        read: ReadId,
        result: Result<(), ReadError>,
        out: &mut Vec<Action>,
    ) -> bool {
        let was_busy = self.scheduler.in_flight(read) > 0;
        self.reads.remove(&read);
        self.scheduler.remove(now, read);
        out.extend([Action::End { read, result }, Action::Changed]);
        was_busy
    }

    /// Bytes of an object that reads in flight have proved and are about to deliver.
    pub fn coming(&self, shard: ShardId, sight: &dyn Sight) -> u64 {
        let reads = self.reads.iter().filter(|(_, reading)| reading.request.shard == shard);
        reads
            .map(|(read, reading)| {
                let kept: u64 = reading.parts.iter().map(|part| part.range.len()).sum();
                kept + self.scheduler.proved(*read, &|request| sight.proved(*read, request))
            })
            .sum()
    }
}
