//! Blocking reads of many ranges at once, from the engine's own thread.
//!
//! Invariant: at most [`READS_MAX`] reads are under way, so at most that many
//! results wait in memory, however much is asked for.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt;
use tokio::runtime::Handle;

use crate::store::{ByteRange, Found, RangeReader, ReadError, ReadRequest, ShardId, Tier};

/// Reads under way at a time: enough to keep several peers busy.
const READS_MAX: usize = 16;

/// Reads verified ranges through the store, blocking the caller.
#[derive(Clone)]
pub struct WeightReader {
    reader: Arc<dyn RangeReader>,
    runtime: Handle,
}

impl WeightReader {
    /// `runtime` runs the reads; it must have a thread of its own to run them on
    /// (a multi-thread runtime, or a current-thread one being driven elsewhere).
    pub fn new(reader: Arc<dyn RangeReader>, runtime: Handle) -> Self {
        Self { reader, runtime }
    }

    /// Reads all requests concurrently and hands each result to `each`, with the
    /// request's index, in whatever order they come. Stops at the first error.
    ///
    /// # Panics
    /// If called from within an async task: it blocks.
    pub fn read_each<E: From<ReadError>>(
        &self,
        requests: &[ReadRequest],
        mut each: impl FnMut(usize, Found) -> Result<(), E>,
    ) -> Result<(), E> {
        let reads = requests.iter().copied().enumerate().map(|(i, request)| {
            let reader = Arc::clone(&self.reader);
            let read = self.runtime.spawn(async move { reader.read(request).await });
            async move { (i, request, read.await) }
        });
        let mut reads = futures::stream::iter(reads).buffer_unordered(READS_MAX);
        while let Some((i, request, found)) = futures::executor::block_on(reads.next()) {
            let found = found.map_err(|error| ReadError::Io {
                what: format!("shard {}: the read was dropped", request.shard),
                source: std::io::Error::other(error),
            })?;
            let found = found?;
            if found.bytes.len() as u64 != request.range.len() {
                let detail =
                    format!("{} bytes came for range {}", found.bytes.len(), request.range);
                return Err(ReadError::Corrupt { shard: request.shard, detail }.into());
            }
            each(i, found)?;
        }
        Ok(())
    }

    /// Reads runs of bytes, each made of the pieces given for it, all concurrently;
    /// hands each run to `each` once it is whole, with its index and the slowest
    /// tier that any of its pieces came from.
    pub fn read_runs<E: From<ReadError>>(
        &self,
        runs: &[&[Piece]],
        mut each: impl FnMut(usize, &[u8], Tier) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut requests = Vec::new();
        // The run of each request, and its first byte's place in the run.
        let mut targets = Vec::new();
        for (run, pieces) in runs.iter().enumerate() {
            let mut offset = 0;
            for piece in *pieces {
                requests.push(ReadRequest::token(piece.shard, piece.range));
                targets.push((run, offset));
                offset += piece.range.len() as usize;
            }
        }
        let mut partials: HashMap<usize, Partial> = HashMap::new();
        self.read_each(&requests, |i, found| {
            let (run, offset) = targets[i];
            if runs[run].len() == 1 {
                return each(run, &found.bytes, found.tier);
            }
            let partial = partials.entry(run).or_insert_with(|| Partial::new(runs[run]));
            partial.bytes[offset..offset + found.bytes.len()].copy_from_slice(&found.bytes);
            partial.missing -= 1;
            partial.tier = partial.tier.max(found.tier);
            if partial.missing > 0 {
                return Ok(());
            }
            match partials.remove(&run) {
                Some(whole) => each(run, &whole.bytes, whole.tier),
                None => Ok(()),
            }
        })
    }
}

/// A range of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub shard: ShardId,
    pub range: ByteRange,
}

/// A run of which not all pieces have come.
struct Partial {
    bytes: Vec<u8>,
    missing: usize,
    tier: Tier,
}

impl Partial {
    fn new(pieces: &[Piece]) -> Self {
        let len: u64 = pieces.iter().map(|piece| piece.range.len()).sum();
        Self { bytes: vec![0; len as usize], missing: pieces.len(), tier: Tier::Vram }
    }
}
