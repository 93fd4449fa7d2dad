//! Where a conversion's shards go: the interface, and a sink in memory (`dir_sink` writes a
//! directory).

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::Result;
use doppler_store::{Found, RangeReader, ReadError, ReadRequest, ShardId, Tier};

/// Receives shards in order (those after [`ShardSink::finished`]), then the files beside them, then the manifest.
pub trait ShardSink {
    /// The first call: receives the bytes of all shards together, before anything is read for them.
    ///
    /// # Errors
    /// If there is no room for them.
    fn begin(&mut self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// The first shards that an interrupted run of the same conversion has given already, in order:
    /// ids and sizes in bytes.
    fn finished(&self) -> Vec<(ShardId, u64)> {
        Vec::new()
    }

    /// Receives a finished shard. `id` is the hash of `bytes`.
    fn shard(&mut self, filename: &str, id: ShardId, bytes: Vec<u8>) -> Result<()>;

    /// Receives a file beside the shards, such as the tokenizer.
    fn file(&mut self, name: &str, bytes: Vec<u8>) -> Result<()>;

    /// The last call: receives `manifest.json`, which completes the model.
    fn finish(&mut self, manifest: Vec<u8>) -> Result<()>;
}

/// Keeps a model in memory: shards, tokenizer and manifest by content address.
#[derive(Debug, Default, Clone)]
pub struct MemorySink {
    objects: HashMap<ShardId, Bytes>,
}

impl MemorySink {
    /// A whole object.
    pub fn get(&self, id: ShardId) -> Option<Bytes> {
        self.objects.get(&id).cloned()
    }

    /// Bytes of all objects.
    pub fn size(&self) -> u64 {
        self.objects.values().map(|bytes| bytes.len() as u64).sum()
    }
}

impl ShardSink for MemorySink {
    fn shard(&mut self, _filename: &str, id: ShardId, bytes: Vec<u8>) -> Result<()> {
        self.objects.insert(id, bytes.into());
        Ok(())
    }

    fn file(&mut self, _name: &str, bytes: Vec<u8>) -> Result<()> {
        self.objects.insert(ShardId::of(&bytes), bytes.into());
        Ok(())
    }

    fn finish(&mut self, manifest: Vec<u8>) -> Result<()> {
        self.file("manifest.json", manifest)
    }
}

impl RangeReader for MemorySink {
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, std::result::Result<Found, ReadError>> {
        let ReadRequest { shard, range, .. } = request;
        let found = match self.objects.get(&shard) {
            None => Err(ReadError::NotFound { shard, waited: Duration::ZERO }),
            Some(bytes) if range.end() > bytes.len() as u64 => {
                Err(ReadError::OutOfRange { shard, range, size: bytes.len() as u64 })
            }
            // The range is within the object, whose length is a usize.
            Some(bytes) => Ok(Found {
                bytes: bytes.slice(range.start() as usize..range.end() as usize),
                tier: Tier::Ram,
            }),
        };
        futures::future::ready(found).boxed()
    }
}
