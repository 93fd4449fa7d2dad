//! Blocking reads of many ranges at once, from the engine's own thread.
//!
//! Invariant: at most [`READS_MAX`] reads are under way, so at most that many
//! results wait in memory, however much is asked for.

use std::sync::Arc;

use futures::StreamExt;
use tokio::runtime::Handle;

use crate::store::{Found, RangeReader, ReadError, ReadRequest};

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
        let _context = self.runtime.enter();
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

    /// Reads all requests concurrently; results in the order of the requests.
    pub fn read_many(&self, requests: &[ReadRequest]) -> Result<Vec<Found>, ReadError> {
        let mut found: Vec<Option<Found>> = vec![None; requests.len()];
        self.read_each(requests, |i, result| -> Result<(), ReadError> {
            found[i] = Some(result);
            Ok(())
        })?;
        Ok(found.into_iter().flatten().collect())
    }
}
