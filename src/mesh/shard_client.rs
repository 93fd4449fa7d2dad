//! The client side of the shard protocol: sends one request on a stream, verifies the answer while
//! it arrives, and keeps the stream for the next request.
//!
//! Invariant: at most one 16 KiB group is read after the first wrong byte. A stream on which
//! anything went wrong is dropped, never kept.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;
use doppler_swarm::{Stream, SwarmHandle};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;

use super::core::limits::HEARD_EVERY;
use super::core::{Failure, FailureKind, RELAYED};
use super::limiter::Limiter;
use super::options::{
    IDLE_STREAM_CLIENT, IDLE_STREAMS_PER_PEER_MAX, PROGRESS_LOOK, PROVED_WITHIN, REQUEST_STUCK,
    SHARD_PROTOCOL,
};
use super::pace::{Pace, Paces};
use crate::wire::{FRAME_BYTES_MAX, ShardReply, ShardRequest};
use doppler_store::verified::{DecodeError, RangeDecoder, VerifiedBuf};

/// A request that did not bring everything it asked for.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) failure: Failure,
    /// What had been proved when it broke off, from the start of its range on. `None` if the peer
    /// broke the protocol or sent a wrong byte.
    pub(super) proved: Option<VerifiedBuf>,
}

/// A request to a peer, and what its task shares with its caller.
pub(super) struct Demand<'a> {
    pub(super) peer: PeerId,
    pub(super) request: ShardRequest,
    /// Whether it may go over a relay.
    pub(super) may_relay: bool,
    /// Called from time to time while bytes arrive.
    pub(super) heard: Heard<'a>,
    /// Ends the request early.
    pub(super) stop: CancellationToken,
}

struct Kept {
    stream: Stream,
    since: Instant,
}

/// Asks peers for ranges. Keeps at most `IDLE_STREAMS_PER_PEER_MAX` streams per peer, which are
/// dropped when the peer disconnects.
pub(super) struct Client {
    swarm: SwarmHandle,
    idle: Duration,
    limit: Arc<Limiter>,
    paces: Paces,
    kept: Mutex<HashMap<PeerId, Vec<Kept>>>,
}

impl Client {
    pub(super) fn new(swarm: SwarmHandle, idle: Duration, limit: Arc<Limiter>) -> Self {
        Self { swarm, idle, limit, paces: Paces::default(), kept: Mutex::default() }
    }

    /// Asks one peer for one range of at most `SERVE_BYTES_MAX` and decodes the answer.
    pub(super) async fn request(
        &self,
        demand: Demand<'_>,
        mut decoder: RangeDecoder,
    ) -> Result<VerifiedBuf, Broken> {
        // The peer is not to blame for this node's own limit.
        let patience = if self.limit.is_limited() { 4 } else { 1 };
        let (pace, proved) = (self.paces.of(demand.peer), decoder.proved());
        let ended = tokio::select! {
            ended = self.request_unlimited(&demand, &pace, &mut decoder) => ended,
            () = demand.stop.cancelled() => Err(failure(FailureKind::Stopped, 0, String::new())),
            since = unproved(&pace, &proved, patience) => {
                let detail = format!("sent nothing that could be proved for {} s", since.as_secs());
                Err(failure(FailureKind::Stalled, 0, detail))
            }
        };
        match ended {
            Ok(()) => {
                let nothing = || failure(FailureKind::Violation, 0, "sent nothing".into());
                let nothing = || Broken { failure: nothing(), proved: None };
                decoder.finish().ok_or_else(nothing)
            }
            Err(failure) => {
                let proved = if failure.kind.keeps() { decoder.finish() } else { None };
                Err(Broken { failure, proved })
            }
        }
    }

    async fn request_unlimited(
        &self,
        demand: &Demand<'_>,
        pace: &Pace,
        decoder: &mut RangeDecoder,
    ) -> Result<(), Failure> {
        let peer = demand.peer;
        if let Some(mut stream) = self.take(peer) {
            match self.exchange(&mut stream, demand, pace, decoder).await {
                Ok(()) => {
                    self.keep(peer, stream);
                    return Ok(());
                }
                // The server may have dropped an idle stream, which says nothing about the peer.
                Err((failure, Progress::Unanswered)) if failure.kind == FailureKind::Lost => {}
                Err((failure, _)) => return Err(self.after(peer, stream, failure)),
            }
        }
        let opened = self.swarm.open_stream(peer, SHARD_PROTOCOL).await;
        let mut stream =
            opened.map_err(|error| failure(FailureKind::Lost, 0, error.to_string()))?;
        if stream.is_relayed() && !demand.may_relay {
            return Err(failure(FailureKind::Relayed, 0, RELAYED.into()));
        }
        match self.exchange(&mut stream, demand, pace, decoder).await {
            Ok(()) => {
                self.keep(peer, stream);
                Ok(())
            }
            Err((failure, _)) => Err(self.after(peer, stream, failure)),
        }
    }

    /// If the peer merely refused, the stream can still be used.
    fn after(&self, peer: PeerId, stream: Stream, failure: Failure) -> Failure {
        match failure.kind {
            FailureKind::NotFound
            | FailureKind::OutOfRange { .. }
            | FailureKind::Overloaded
            | FailureKind::Refused
            | FailureKind::Relayed => self.keep(peer, stream),
            FailureKind::Wrong
            | FailureKind::Violation
            | FailureKind::Stalled
            | FailureKind::Stopped
            | FailureKind::Lost => drop(stream),
        }
        failure
    }

    async fn exchange(
        &self,
        stream: &mut Stream,
        demand: &Demand<'_>,
        pace: &Pace,
        decoder: &mut RangeDecoder,
    ) -> Result<(), (Failure, Progress)> {
        let mut reader = Watched::new(stream, self.idle, &self.limit, pace, demand.heard);
        let reply = ask(&mut reader, demand.request)
            .await
            .map_err(|error| (io_failure(&error, 0), Progress::Unanswered))?;
        let answer = answer(&mut reader, demand.request, reply, decoder).await;
        answer.map_err(|failure| (failure, Progress::Answered))
    }

    fn take(&self, peer: PeerId) -> Option<Stream> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let streams = kept.get_mut(&peer)?;
        streams.retain(|one| one.since.elapsed() < IDLE_STREAM_CLIENT);
        streams.pop().map(|one| one.stream)
    }

    fn keep(&self, peer: PeerId, stream: Stream) {
        // By the next request there may be a direct connection.
        if stream.is_relayed() {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let streams = kept.entry(peer).or_default();
        if streams.len() < IDLE_STREAMS_PER_PEER_MAX {
            streams.push(Kept { stream, since: Instant::now() });
        }
    }

    /// Drops the streams kept to a peer that has gone.
    pub(super) fn forget(&self, peer: PeerId) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
        self.paces.forget(peer);
    }
}

/// Waits until nothing from a request's peer, or nothing of the request itself, has been proved for
/// too long. Returns how long that was.
async fn unproved(pace: &Pace, proved: &AtomicU64, patience: u32) -> Duration {
    let began = Instant::now();
    let (mut own, mut seen) = (began, proved.load(Ordering::Relaxed));
    loop {
        sleep(PROGRESS_LOOK).await;
        let (now, so_far) = (Instant::now(), proved.load(Ordering::Relaxed));
        if so_far > seen {
            (own, seen) = (now, so_far);
            pace.proved(now);
        }
        let by_peer = now.saturating_duration_since(pace.proved_at().max(began));
        if by_peer >= PROVED_WITHIN * patience {
            return by_peer;
        }
        if now - own >= REQUEST_STUCK * patience {
            return now - own;
        }
    }
}

/// How far an exchange got.
enum Progress {
    Unanswered,
    Answered,
}

/// Sends the request and reads the reply's header.
async fn ask(
    stream: &mut Watched<'_>,
    request: ShardRequest,
) -> io::Result<Result<ShardReply, String>> {
    let idle = stream.idle;
    let send = async {
        stream.stream.write_all(&request.encode()).await?;
        stream.stream.flush().await
    };
    tokio::time::timeout(idle, send).await.map_err(|_| io::ErrorKind::TimedOut)??;
    stream.rearm(Instant::now());
    let length = usize::from(stream.read_u16().await?);
    if length > FRAME_BYTES_MAX {
        return Ok(Err(format!("a reply of {length} bytes")));
    }
    let mut frame = [0; FRAME_BYTES_MAX];
    stream.read_exact(&mut frame[..length]).await?;
    Ok(ShardReply::decode(&frame[..length]).map_err(|error| error.to_string()))
}

/// Reads and verifies what the reply announced.
async fn answer(
    stream: &mut Watched<'_>,
    request: ShardRequest,
    reply: Result<ShardReply, String>,
    decoder: &mut RangeDecoder,
) -> Result<(), Failure> {
    let says = |kind, detail: &str| failure(kind, 0, detail.to_owned());
    let (object_size, body_bytes) = match reply {
        Ok(ShardReply::Ok { object_size, body_bytes }) => (object_size, body_bytes),
        Ok(ShardReply::NotFound) => return Err(says(FailureKind::NotFound, "does not have it")),
        Ok(ShardReply::OutOfRange { object_size }) => {
            let kind = FailureKind::OutOfRange { object_size };
            return Err(says(kind, "says that the range is outside the object"));
        }
        Ok(ShardReply::Overloaded) => return Err(says(FailureKind::Overloaded, "is overloaded")),
        Ok(ShardReply::Refused) => return Err(says(FailureKind::Refused, "refused")),
        Ok(ShardReply::Relayed) => return Err(says(FailureKind::Relayed, RELAYED)),
        Ok(ShardReply::Failed) => return Err(says(FailureKind::Refused, "could not read it")),
        Err(detail) => return Err(failure(FailureKind::Violation, 0, detail)),
    };
    stream.read = 0;
    let mut body = stream.take(body_bytes);
    let decoded = decoder.run(request.shard, object_size, request.range, &mut body).await;
    let left = body.limit();
    let read = stream.read;
    match decoded {
        Ok(()) if left == 0 => Ok(()),
        Ok(()) => {
            Err(failure(FailureKind::Violation, read, format!("{left} bytes more than needed")))
        }
        Err(error) if error.is_wrong_bytes() => {
            Err(failure(FailureKind::Wrong, read, error.to_string()))
        }
        Err(DecodeError::Io { source, .. }) => Err(io_failure(&source, read)),
        // It ended early although the announced bytes came, or its lengths are impossible.
        Err(error @ DecodeError::Truncated { .. }) if left > 0 => {
            Err(failure(FailureKind::Lost, read, error.to_string()))
        }
        Err(error) => Err(failure(FailureKind::Violation, read, error.to_string())),
    }
}

fn failure(kind: FailureKind, bytes: u64, detail: String) -> Failure {
    Failure { kind, bytes, detail }
}

fn io_failure(error: &io::Error, bytes: u64) -> Failure {
    if error.kind() == io::ErrorKind::TimedOut {
        failure(FailureKind::Stalled, bytes, "went silent".into())
    } else {
        failure(FailureKind::Lost, bytes, format!("connection lost: {error}"))
    }
}

/// A callback for the arrival of bytes.
pub(super) type Heard<'a> = &'a (dyn Fn() + Send + Sync);

/// A stream that counts what is read, keeps to the download limit, and fails once nothing has
/// arrived for `idle`, on it or on another stream of its peer.
struct Watched<'a> {
    stream: &'a mut Stream,
    idle: Duration,
    silent: Pin<Box<Sleep>>,
    /// Runs while the limit delays reading.
    pause: Option<Pin<Box<Sleep>>>,
    limit: &'a Limiter,
    pace: &'a Pace,
    heard: Heard<'a>,
    /// When `heard` was last called and the time-out last moved.
    noted: Instant,
    read: u64,
}

impl<'a> Watched<'a> {
    fn new(
        stream: &'a mut Stream,
        idle: Duration,
        limit: &'a Limiter,
        pace: &'a Pace,
        heard: Heard<'a>,
    ) -> Self {
        let (silent, noted) = (Box::pin(sleep(idle)), Instant::now());
        Self { stream, idle, silent, pause: None, limit, pace, heard, noted, read: 0 }
    }

    fn rearm(&mut self, now: Instant) {
        self.silent.as_mut().reset((now + self.idle).into());
        self.noted = now;
    }
}

impl AsyncRead for Watched<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(pause) = &mut this.pause {
            ready!(pause.as_mut().poll(cx));
            this.pause = None;
            this.rearm(Instant::now());
        }
        let before = buf.filled().len();
        match Pin::new(&mut *this.stream).poll_read(cx, buf) {
            Poll::Ready(done) => {
                let bytes = (buf.filled().len() - before) as u64;
                this.read += bytes;
                let now = Instant::now();
                // Timers and locks are not touched for every frame.
                if now.duration_since(this.noted) >= HEARD_EVERY {
                    this.rearm(now);
                    this.pace.moved(now);
                    (this.heard)();
                }
                let wait = this.limit.take(bytes);
                if !wait.is_zero() {
                    this.pause = Some(Box::pin(sleep(wait)));
                }
                Poll::Ready(done)
            }
            Poll::Pending => loop {
                ready!(this.silent.as_mut().poll(cx));
                // It may have to wait its turn behind other streams of this peer.
                let until = this.pace.moved_at() + this.idle;
                if until <= Instant::now() {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                this.silent.as_mut().reset(until.into());
            },
        }
    }
}
