//! Blocking reads of many runs of bytes at once, from the engine's own thread.
//!
//! Invariant: at most [`READS_MAX`] runs are in flight, so at most that many results wait in
//! memory, however much is asked for. Dropping a read cancels it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use doppler_store::{
    ByteRange, Found, Priority, RangeReader, ReadError, ReadRequest, ShardId, Tier,
};

/// Runs in flight at a time: enough to keep several peers busy.
const READS_MAX: usize = 16;

/// Pieces of one run in flight at a time.
const PIECES_MAX: usize = 4;

/// A range of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardRange {
    pub shard: ShardId,
    pub range: ByteRange,
}

/// Reads verified ranges through the store, blocking the caller.
#[derive(Clone)]
pub struct WeightReader {
    reader: Arc<dyn RangeReader>,
    runtime: Handle,
}

impl WeightReader {
    /// `runtime` runs the reads. It must have a thread to run them on: a multi-thread runtime, or a
    /// current-thread one that another thread drives.
    pub fn new(reader: Arc<dyn RangeReader>, runtime: Handle) -> Self {
        Self { reader, runtime }
    }

    /// Starts to read a run of bytes made of these pieces.
    pub fn begin(&self, pieces: &[ShardRange], priority: Priority) -> Reading {
        let (reader, pieces) = (Arc::clone(&self.reader), pieces.to_vec());
        Reading(self.runtime.spawn(async move { run(reader.as_ref(), pieces, priority).await }))
    }

    /// Reads runs of bytes concurrently, each made of the pieces given for it. They arrive in the
    /// order in which they are completed. On return the first reads are in flight.
    pub fn runs<'a>(&self, runs: impl IntoIterator<Item = Run<'a>>) -> Runs<'a> {
        let waiting: VecDeque<_> = runs.into_iter().enumerate().collect();
        let mut runs = Runs { reader: self.clone(), waiting, under_way: FuturesUnordered::new() };
        runs.begin();
        runs
    }
}

/// A run of bytes being read. Dropping it cancels the read.
pub struct Reading(JoinHandle<Result<(Bytes, Tier), ReadError>>);

impl Future for Reading {
    type Output = Result<(Bytes, Tier), ReadError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let read = ready!(self.0.poll_unpin(cx));
        let dropped = |error| ReadError::Io {
            what: "the read was dropped".to_owned(),
            source: std::io::Error::other(error),
        };
        Poll::Ready(read.map_err(dropped).and_then(|read| read))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A run of bytes to read.
pub struct Run<'a> {
    pub pieces: &'a [ShardRange],
    /// Its read, if it was started earlier. If that fails, it is read once more.
    pub begun: Option<Reading>,
}

type Numbered = futures::future::BoxFuture<'static, (usize, Result<(Bytes, Tier), ReadError>)>;

/// Runs being read. Yields each with its index, its bytes, and the slowest tier that any of its
/// pieces came from. Blocks, and panics if called from within an async task.
pub struct Runs<'a> {
    reader: WeightReader,
    waiting: VecDeque<(usize, Run<'a>)>,
    under_way: FuturesUnordered<Numbered>,
}

impl Runs<'_> {
    fn begin(&mut self) {
        while self.under_way.len() < READS_MAX
            && let Some((number, Run { pieces, begun })) = self.waiting.pop_front()
        {
            let read = match begun {
                None => self.reader.begin(pieces, Priority::Token).boxed(),
                Some(begun) => {
                    let (reader, pieces) = (self.reader.clone(), pieces.to_vec());
                    let again = move || reader.begin(&pieces, Priority::Token);
                    begun.or_else(move |_| again()).boxed()
                }
            };
            self.under_way.push(read.map(move |read| (number, read)).boxed());
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<(usize, Bytes, Tier), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (run, read) = futures::executor::block_on(self.under_way.next())?;
        self.begin();
        Some(read.map(|(bytes, tier)| (run, bytes, tier)))
    }
}

async fn run(
    reader: &dyn RangeReader,
    pieces: Vec<ShardRange>,
    priority: Priority,
) -> Result<(Bytes, Tier), ReadError> {
    if let [piece] = pieces[..] {
        let found = read(reader, piece, priority).await?;
        return Ok((found.bytes, found.tier));
    }
    let len: u64 = pieces.iter().map(|piece| piece.range.len()).sum();
    let mut whole = BytesMut::with_capacity(len as usize);
    let mut slowest = Tier::Vram;
    let reads = pieces.into_iter().map(|piece| read(reader, piece, priority));
    let mut reads = futures::stream::iter(reads).buffered(PIECES_MAX);
    while let Some(found) = reads.try_next().await? {
        whole.extend_from_slice(&found.bytes);
        slowest = slowest.max(found.tier);
    }
    Ok((whole.freeze(), slowest))
}

async fn read(
    reader: &dyn RangeReader,
    piece: ShardRange,
    priority: Priority,
) -> Result<Found, ReadError> {
    let ShardRange { shard, range } = piece;
    let found = reader.read(ReadRequest { shard, range, priority, deadline: None }).await?;
    if found.bytes.len() as u64 == range.len() {
        return Ok(found);
    }
    let detail = format!("{} bytes came for range {range}", found.bytes.len());
    Err(ReadError::Corrupt { shard, detail })
}
