//! One read from peers: carries out the core's orders, verifies the bytes that arrive, and joins
//! them.
//!
//! Decides nothing: whom to ask, what to keep and when to give up are orders. Invariants: it never
//! polls; dropping the read ends its requests and frees their room.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::core::{Answer, Ask, Event, Proved, ReadId, RequestId};
use super::shard_client::{Broken, Demand};
use super::shared::{Order, Shared};
use crate::wire::ShardRequest;
use doppler_store::verified::{GROUP_BYTES, RangeDecoder, VerifiedBuf, VerifiedRange};
use doppler_store::{ByteRange, ReadError, ReadRequest};

/// The result of a request's task.
type Brought = (Ask, Result<VerifiedBuf, Broken>);

/// The memory of a read, which is given out to its requests. Memory of a failed request is not
/// given out again: the next request for those bytes gets new memory.
struct Memory {
    /// Unused parts, by their offset in the object.
    free: BTreeMap<u64, BytesMut>,
}

impl Memory {
    fn new(range: ByteRange) -> Self {
        // The last group may be sent in full.
        let start = range.start() / GROUP_BYTES * GROUP_BYTES;
        let bytes = range.end().next_multiple_of(GROUP_BYTES) - start;
        Self { free: BTreeMap::from([(start, BytesMut::with_capacity(bytes as usize))]) }
    }

    /// Memory for a range. Empty if it was already given out, even partly.
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

/// Fetches `request.range`, extended to whole groups.
pub(super) async fn fetch(
    shared: Arc<Shared>,
    request: ReadRequest,
) -> Result<VerifiedRange, ReadError> {
    Reading::begin(shared, request).run().await
}

/// The ways to end a request: at once, or keeping what it has proved.
struct Running {
    abort: AbortHandle,
    stop: CancellationToken,
}

/// One read in flight. Dropping it removes it from the schedule.
struct Reading {
    shared: Arc<Shared>,
    request: ReadRequest,
    id: ReadId,
    orders: mpsc::Receiver<Order>,
    /// Dropping the set aborts its tasks.
    running: JoinSet<Brought>,
    handles: BTreeMap<RequestId, Running>,
    /// Allocated when the first peer is asked.
    memory: Option<Memory>,
    /// The result of a request, until the core decides whether to keep it.
    arrived: Option<(RequestId, VerifiedBuf)>,
    kept: BTreeMap<RequestId, VerifiedBuf>,
}

impl Reading {
    fn begin(shared: Arc<Shared>, request: ReadRequest) -> Self {
        let (id, orders) = shared.begin(request);
        Self {
            shared,
            request,
            id,
            orders,
            running: JoinSet::new(),
            handles: BTreeMap::new(),
            memory: None,
            arrived: None,
            kept: BTreeMap::new(),
        }
    }

    async fn run(mut self) -> Result<VerifiedRange, ReadError> {
        let end = loop {
            let step = tokio::select! {
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => ControlFlow::Break(Err(ReadError::Overloaded(
                        "the mesh has stopped".into(),
                    ))),
                },
                Some(brought) = self.running.join_next(), if !self.running.is_empty() => {
                    self.on_brought(brought)
                }
            };
            if let ControlFlow::Break(end) = step {
                break end;
            }
        };
        end?;
        let mut pieces: Vec<VerifiedBuf> = std::mem::take(&mut self.kept).into_values().collect();
        pieces.sort_by_key(|piece| piece.range().start());
        VerifiedBuf::join(pieces).map_err(|_| {
            let detail = "its parts do not fit together".into();
            ReadError::Corrupt { shard: self.request.shard, detail }
        })
    }

    fn obey(&mut self, order: Order) -> ControlFlow<Result<(), ReadError>> {
        match order {
            Order::Ask { ask, may_relay } => self.ask(ask, may_relay),
            Order::Keep { request, end } => {
                let arrived = self.arrived.take().filter(|(arrived, _)| *arrived == request);
                if let Some(piece) = arrived.and_then(|(_, piece)| piece.cut(end)) {
                    self.kept.insert(request, piece);
                }
            }
            Order::Stop { request } => {
                if let Some(running) = self.handles.get(&request) {
                    running.stop.cancel();
                }
            }
            Order::Abandon { request } => {
                if let Some(running) = self.handles.remove(&request) {
                    running.abort.abort();
                }
            }
            Order::Discard { request } => {
                self.kept.remove(&request);
            }
            Order::End(end) => return ControlFlow::Break(end),
        }
        ControlFlow::Continue(())
    }

    fn ask(&mut self, ask: Ask, may_relay: bool) {
        let memory = self.memory.get_or_insert_with(|| Memory::new(self.request.range));
        let decoder = RangeDecoder::new(memory.take(ask.range));
        self.shared.watch(self.id, ask.request, decoder.proved());
        let request = ShardRequest {
            shard: self.request.shard,
            range: ask.range,
            priority: self.request.priority,
        };
        let shared = Arc::clone(&self.shared);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let abort = self.running.spawn(async move {
            let heard = || shared.note(Event::Heard { peer: ask.peer });
            let demand =
                Demand { peer: ask.peer, request, may_relay, heard: &heard, stop: stopped };
            (ask, shared.client.request(demand, decoder).await)
        });
        self.handles.insert(ask.request, Running { abort, stop });
    }

    /// Tells the core how a request ended, and carries out the consequences.
    fn on_brought(
        &mut self,
        brought: Result<Brought, JoinError>,
    ) -> ControlFlow<Result<(), ReadError>> {
        let (ask, brought) = match brought {
            Ok(brought) => brought,
            // The request was abandoned; a panic is passed on.
            Err(error) if error.is_cancelled() => return ControlFlow::Continue(()),
            Err(error) => {
                let what = format!("a transfer was abandoned: {error}");
                return ControlFlow::Break(Err(ReadError::Overloaded(what)));
            }
        };
        self.handles.remove(&ask.request);
        let (outcome, piece) = match brought {
            Ok(piece) => (Ok(()), Some(piece)),
            Err(Broken { failure, proved }) => {
                debug!(peer = %ask.peer, shard = %self.request.shard.short(), detail = %failure.detail,
                    "a request ended early");
                (Err(failure), proved)
            }
        };
        let proved =
            piece.as_ref().map(|piece| Proved { end: piece.range().end(), size: piece.size() });
        self.arrived = piece.map(|piece| (ask.request, piece));
        let answer = Answer { outcome, proved };
        let (read, request, peer) = (self.id, ask.request, ask.peer);
        self.shared.note(Event::Answered { read, request, peer, answer });
        // The core has already given the orders that follow from it.
        while let Ok(order) = self.orders.try_recv() {
            self.obey(order)?;
        }
        self.arrived = None;
        ControlFlow::Continue(())
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.shared.note(Event::Dropped { read: self.id });
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
