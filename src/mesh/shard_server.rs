//! The server side of the shard protocol.
//!
//! Refuses more streams than its limits, more replies at once than upload slots, and requests out
//! of bounds. Invariant: everything it sends comes from `ShardServe`, which checks it, and is held
//! here in full.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;
use doppler_swarm::{IncomingStream, IncomingStreams, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::core::Event;
use super::core::limits::RELAYED_MANIFEST_BYTES_MAX;
use super::limiter::Limiter;
use super::options::{
    ENCODE_TIMEOUT, IDLE_STREAM_SERVER, LIMITED_BYTES, LIMITED_SLOT_RATE, SLOT_WAIT, STREAMS_MAX,
    STREAMS_PER_PEER_MAX, WRITE_BYTES, WRITE_STUCK,
};
use super::pace::Paces;
use super::shared::Shared;
use crate::wire::{BODY_BYTES_MAX, FRAME_BYTES_MAX, ShardReply, ShardRequest};
use doppler_store::verified::GROUP_BYTES;
use doppler_store::{Priority, ReadError, Served, ShardServe};

/// A peer with open streams.
struct Guest {
    streams: usize,
    slots: Arc<Semaphore>,
}

/// Answers peers' requests from what this node holds.
pub(super) struct Server {
    serve: Arc<dyn ShardServe>,
    shared: Arc<Shared>,
    /// Every reply in flight holds one.
    slots: Arc<Semaphore>,
    /// Replies for which no token waits must hold one of these, too. So a quarter of the slots is
    /// left for replies for which a token waits.
    patient_slots: Arc<Semaphore>,
    /// The most slots that one peer may hold, so that it cannot take all of them.
    slots_per_peer: usize,
    limit: Limiter,
    /// When each peer last took bytes.
    paces: Paces,
    idle: Duration,
    streams: Mutex<HashMap<PeerId, Guest>>,
}

impl Server {
    pub(super) fn new(
        serve: Arc<dyn ShardServe>,
        shared: Arc<Shared>,
        upload_slots: usize,
        upload_limit: Option<u64>,
        idle: Duration,
    ) -> Self {
        // With a limit, fewer replies run at once, so that none looks stalled.
        let affordable = upload_limit.map_or(u64::MAX, |limit| limit / LIMITED_SLOT_RATE);
        let slots = upload_slots.min(usize::try_from(affordable).unwrap_or(usize::MAX)).max(1);
        let share = if upload_limit.is_some() { 4 } else { 2 };
        Self {
            serve,
            shared,
            slots: Arc::new(Semaphore::new(slots)),
            patient_slots: Arc::new(Semaphore::new((slots - slots / 4).max(1))),
            slots_per_peer: (slots / share).max(1),
            paces: Paces::default(),
            limit: Limiter::new(upload_limit),
            idle,
            streams: Mutex::default(),
        }
    }

    /// Serves every stream that arrives until cancelled. The loop only spawns.
    pub(super) async fn run(
        self: Arc<Self>,
        mut incoming: IncomingStreams,
        cancel: CancellationToken,
    ) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                next = incoming.recv() => {
                    let Some(IncomingStream { peer, stream }) = next else { break };
                    // Finished tasks are cleared before they are counted.
                    while tasks.try_join_next().is_some() {}
                    let slots = if tasks.len() < STREAMS_MAX { self.enter(peer) } else { None };
                    let Some(slots) = slots else {
                        self.shared.stream_refused();
                        debug!(%peer, "too many streams; refused one");
                        continue;
                    };
                    let server = self.clone();
                    tasks.spawn(async move {
                        let end = server.stream(peer, &slots, stream).await;
                        server.leave(peer);
                        if let Err(error) = end {
                            debug!(%peer, %error, "stream ended");
                        }
                    });
                }
            }
        }
        tasks.shutdown().await;
    }

    /// Registers another stream of a peer, and returns the slots that its streams share. `None` if
    /// it has too many.
    fn enter(&self, peer: PeerId) -> Option<Arc<Semaphore>> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = || Arc::new(Semaphore::new(self.slots_per_peer));
        let guest = streams.entry(peer).or_insert_with(|| Guest { streams: 0, slots: slots() });
        if guest.streams >= STREAMS_PER_PEER_MAX {
            return None;
        }
        guest.streams += 1;
        self.shared.stream_opened();
        Some(Arc::clone(&guest.slots))
    }

    fn leave(&self, peer: PeerId) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(guest) = streams.get_mut(&peer) {
            guest.streams -= 1;
            self.shared.stream_closed();
            if guest.streams == 0 {
                streams.remove(&peer);
                self.paces.forget(peer);
            }
        }
    }

    /// One stream: requests one after another, until it idles, ends or breaks.
    async fn stream(&self, peer: PeerId, slots: &Semaphore, mut stream: Stream) -> io::Result<()> {
        loop {
            let Ok(length) = timeout(IDLE_STREAM_SERVER, stream.read_u16()).await else {
                return Ok(());
            };
            let length = match length {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                length => usize::from(length?),
            };
            if length > FRAME_BYTES_MAX {
                return Err(io::Error::other(format!("a request of {length} bytes")));
            }
            let mut frame = [0; FRAME_BYTES_MAX];
            let read = stream.read_exact(&mut frame[..length]);
            timeout(self.idle, read).await.map_err(|_| io::ErrorKind::TimedOut)??;
            match ShardRequest::decode(&frame[..length]) {
                Ok(request) => self.reply(peer, slots, &mut stream, request).await?,
                Err(error) => {
                    debug!(%peer, %error, "request out of bounds");
                    self.write(peer, &mut stream, &ShardReply::Refused.encode()).await?;
                    self.flush(peer, &mut stream).await?;
                }
            }
        }
    }

    async fn reply(
        &self,
        peer: PeerId,
        slots: &Semaphore,
        stream: &mut Stream,
        request: ShardRequest,
    ) -> io::Result<()> {
        if stream.is_relayed() && !self.shared.look(|core, _| core.may_relay(request.shard)) {
            debug!(%peer, shard = %request.shard.short(), "not sent over a relay");
            self.write(peer, stream, &ShardReply::Relayed.encode()).await?;
            return self.flush(peer, stream).await;
        }
        // Held until the reply is written, which bounds memory. The peer's own slot comes first:
        // waiting for it takes nothing from others.
        let slot = timeout(SLOT_WAIT, async {
            (slots.acquire().await.ok(), self.slot(request.priority).await)
        });
        let slot = slot.await;
        let served = match slot {
            Ok(_) => self.serve(request).await,
            Err(_) => Err(ShardReply::Overloaded),
        };
        // Its publisher may have announced a smaller size than it has.
        let too_large = |served: &Served| served.object_size() > RELAYED_MANIFEST_BYTES_MAX;
        let served = match served {
            Ok(served) if stream.is_relayed() && too_large(&served) => Err(ShardReply::Relayed),
            served => served,
        };
        match served {
            Err(reply) => self.write(peer, stream, &reply.encode()).await?,
            Ok(served) => {
                let body_bytes = self.send(peer, stream, &served).await?;
                self.shared.note(Event::Sent { peer, bytes: body_bytes });
            }
        }
        self.flush(peer, stream).await
    }

    /// Sends a range, a frame at a time. Returns the bytes of its encoding.
    async fn send(&self, peer: PeerId, stream: &mut Stream, served: &Served) -> io::Result<u64> {
        let object_size = served.object_size();
        let body_bytes = match served {
            Served::Encoded(encoded) => encoded.bytes.len() as u64,
            Served::Proved(range) => range.encoded_bytes() as u64,
        };
        let head = ShardReply::Ok { object_size, body_bytes }.encode();
        self.write(peer, stream, &head).await?;
        let at_once = if self.limit.is_limited() { LIMITED_BYTES } else { WRITE_BYTES };
        match served {
            Served::Encoded(encoded) => {
                for part in encoded.bytes.chunks(at_once) {
                    self.limit.pass(part.len() as u64).await;
                    self.write(peer, stream, part).await?;
                }
            }
            Served::Proved(range) => {
                let mut encoder = range.encoder();
                // One more group, and the nodes before it, may be added.
                let mut frame = Vec::with_capacity(at_once + 2 * GROUP_BYTES as usize);
                let mut more = true;
                while more {
                    frame.clear();
                    more = encoder.next(&mut frame, at_once);
                    self.limit.pass(frame.len() as u64).await;
                    self.write(peer, stream, &frame).await?;
                }
            }
        }
        Ok(body_bytes)
    }

    async fn slot(&self, priority: Priority) -> [Option<OwnedSemaphorePermit>; 2] {
        let patient = match priority {
            Priority::Token => None,
            Priority::Prefetch | Priority::Bulk => {
                // An error means that the semaphore is closed, which never happens.
                self.patient_slots.clone().acquire_owned().await.ok()
            }
        };
        [patient, self.slots.clone().acquire_owned().await.ok()]
    }

    async fn serve(&self, request: ShardRequest) -> Result<Served, ShardReply> {
        let serve = self.serve.serve(request.shard, request.range);
        let served = match timeout(ENCODE_TIMEOUT, serve).await {
            Ok(served) => served,
            Err(_) => return Err(ShardReply::Overloaded),
        };
        let bytes = match &served {
            Ok(Served::Encoded(encoded)) => encoded.bytes.len() as u64,
            Ok(Served::Proved(range)) => range.encoded_bytes() as u64,
            Err(_) => 0,
        };
        match served {
            Ok(_) if bytes == 0 => Err(ShardReply::NotFound),
            Ok(_) if bytes > BODY_BYTES_MAX => Err(ShardReply::Failed),
            Ok(served) => Ok(served),
            Err(ReadError::NotFound { .. }) => Err(ShardReply::NotFound),
            Err(ReadError::OutOfRange { size, .. }) => {
                Err(ShardReply::OutOfRange { object_size: size })
            }
            Err(ReadError::Overloaded(_)) => Err(ShardReply::Overloaded),
            Err(ReadError::Refused(_)) => Err(ShardReply::Refused),
            Err(error) => {
                debug!(shard = %request.shard.short(), %error, "cannot serve");
                Err(ShardReply::Failed)
            }
        }
    }

    /// Writes everything. Fails once the peer has taken nothing for `idle`, on this stream or
    /// another.
    async fn write(&self, peer: PeerId, stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
        let pace = self.paces.of(peer);
        let (mut rest, mut own) = (bytes, Instant::now());
        while !rest.is_empty() {
            let wrote = timeout(self.idle, stream.write(rest)).await;
            let now = Instant::now();
            match wrote {
                Ok(wrote) => {
                    rest = match wrote? {
                        0 => return Err(io::ErrorKind::WriteZero.into()),
                        wrote => &rest[wrote..],
                    };
                    own = now;
                    pace.moved(now);
                }
                Err(_) if pace.moved_at() + self.idle > now && own + WRITE_STUCK > now => {}
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }

    async fn flush(&self, peer: PeerId, stream: &mut Stream) -> io::Result<()> {
        let (pace, own) = (self.paces.of(peer), Instant::now());
        loop {
            if let Ok(flushed) = timeout(self.idle, stream.flush()).await {
                return flushed;
            }
            let now = Instant::now();
            if pace.moved_at() + self.idle <= now || own + WRITE_STUCK <= now {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}
