//! Read-only sources of objects outside the store: the shard files of an RDRR
//! directory ([`DirReader`]) and objects in memory ([`MemReader`]).
//!
//! Every byte returned is verified. The first read of a file hashes all of it,
//! one group at a time, and keeps its outboard (4 KiB of memory per MiB of
//! file). Each read is then verified against that outboard, so later changes to
//! the file are detected.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{OnceCell, watch};

use super::error::StoreError;
use super::files;
use super::verified::{Hashed, OBJECT_BYTES_MAX, Outboard, VerifiedRange, align};
use super::{ByteRange, Found, RangeReader, ReadError, ReadRequest, ShardId, Tier, regular};

/// One shard of a directory, as its manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirShard {
    pub shard: ShardId,
    pub path: PathBuf,
    /// The size that the file must have, in bytes.
    pub size: u64,
}

/// The shard files of a directory, as a read-only tier.
pub struct DirReader {
    shards: HashMap<ShardId, Arc<Checked>>,
}

struct Checked {
    of: DirShard,
    /// Set by the first read. The error says what is wrong with the file.
    outboard: OnceCell<Result<Outboard, String>>,
}

impl DirReader {
    pub fn new(shards: impl IntoIterator<Item = DirShard>) -> Self {
        let checked =
            |of: DirShard| (of.shard, Arc::new(Checked { of, outboard: OnceCell::new() }));
        Self { shards: shards.into_iter().map(checked).collect() }
    }

    /// Reads `range`, extended to whole groups, with its proof.
    pub async fn prove(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> Result<VerifiedRange, ReadError> {
        let Some(checked) = self.shards.get(&shard) else {
            return Err(ReadError::NotFound { shard, waited: Duration::ZERO });
        };
        let size = checked.of.size;
        let aligned = align(range, size).ok_or(ReadError::OutOfRange { shard, range, size })?;
        let whole = checked
            .outboard
            .get_or_try_init(|| {
                let of = checked.of.clone();
                blocking(move || check_file(&of))
            })
            .await?;
        let outboard = match whole {
            Ok(outboard) => outboard.clone(),
            Err(detail) => return Err(ReadError::Corrupt { shard, detail: detail.clone() }),
        };
        let path = checked.of.path.clone();
        blocking(move || read_range(&path, &outboard, aligned)).await
    }
}

impl RangeReader for DirReader {
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, Result<Found, ReadError>> {
        async move {
            let ReadRequest { shard, range, .. } = request;
            let proved = self.prove(shard, range).await?;
            let size = proved.size();
            let bytes = proved.slice(range).ok_or(ReadError::OutOfRange { shard, range, size })?;
            Ok(Found { bytes, tier: Tier::Disk })
        }
        .boxed()
    }
}

/// Hashes a whole file. The inner error is permanent: reading again cannot help.
fn check_file(of: &DirShard) -> Result<Result<Outboard, String>, ReadError> {
    let name = of.path.display();
    let io_error =
        |source: io::Error| ReadError::Io { what: of.path.display().to_string(), source };
    let file = regular::open(&of.path).map_err(io_error)?;
    let size = file.metadata().map_err(io_error)?.len();
    if size != of.size {
        return Ok(Err(format!("{name} has {size} bytes, but its manifest says {}", of.size)));
    }
    let outboard = Outboard::of_reader(file, size).map_err(io_error)?;
    if outboard.shard() != of.shard {
        return Ok(Err(format!("the BLAKE3 of {name} is {}", outboard.shard())));
    }
    Ok(Ok(outboard))
}

fn read_range(
    path: &Path,
    outboard: &Outboard,
    range: ByteRange,
) -> Result<VerifiedRange, ReadError> {
    let mut bytes = BytesMut::zeroed(range.len() as usize);
    regular::open(path)
        .and_then(|file| files::read_at(&file, &mut bytes, range.start()))
        .map_err(|source| ReadError::Io { what: path.display().to_string(), source })?;
    outboard.prove(range, bytes.freeze()).map_err(|error| ReadError::Corrupt {
        shard: outboard.shard(),
        detail: format!("{} changed since it was checked: {error}", path.display()),
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        let what = "a file operation was interrupted".to_owned();
        Err(ReadError::Io { what, source: io::Error::other(e) })
    })
}

/// Objects held in memory: the output of a conversion, or what a node without a
/// data directory published.
pub struct MemReader {
    objects: Mutex<HashMap<ShardId, Hashed>>,
    changes: watch::Sender<u64>,
}

impl Default for MemReader {
    fn default() -> Self {
        Self { objects: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl MemReader {
    pub fn new() -> Self {
        Self::default()
    }

    /// Stores an object of at most [`OBJECT_BYTES_MAX`] bytes and returns its id, its BLAKE3 hash.
    pub fn insert(&self, bytes: Bytes) -> Result<ShardId, StoreError> {
        let size = bytes.len() as u64;
        let hashed = Hashed::of(bytes)
            .map_err(|_| StoreError::TooLarge { what: "an object".to_owned(), size })?;
        let shard = hashed.shard();
        self.objects().insert(shard, hashed);
        self.changes.send_modify(|version| *version += 1);
        Ok(shard)
    }

    /// The bytes of a range; `None` if the object is not held.
    pub fn get(&self, shard: ShardId, range: ByteRange) -> Option<Result<Bytes, ReadError>> {
        let bytes = self.objects().get(&shard)?.bytes().clone();
        let size = bytes.len() as u64;
        if range.end() > size {
            return Some(Err(ReadError::OutOfRange { shard, range, size }));
        }
        Some(Ok(bytes.slice(range.start() as usize..range.end() as usize)))
    }

    pub fn contains(&self, shard: ShardId) -> bool {
        self.objects().contains_key(&shard)
    }

    /// A whole object, to serve ranges from.
    pub fn whole(&self, shard: ShardId) -> Option<Hashed> {
        self.objects().get(&shard).cloned()
    }

    pub fn ids(&self) -> Vec<ShardId> {
        self.objects().keys().copied().collect()
    }

    /// Changes whenever [`Self::ids`] does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<ShardId, Hashed>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RangeReader for MemReader {
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, Result<Found, ReadError>> {
        let ReadRequest { shard, range, .. } = request;
        let found = match self.get(shard, range) {
            Some(bytes) => bytes.map(|bytes| Found { bytes, tier: Tier::Ram }),
            None => Err(ReadError::NotFound { shard, waited: Duration::ZERO }),
        };
        futures::future::ready(found).boxed()
    }
}

const _: () = assert!(OBJECT_BYTES_MAX <= usize::MAX as u64);

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn shard_file(dir: &Path, name: &str, bytes: &[u8]) -> DirShard {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        DirShard { shard: ShardId::of(bytes), path, size: bytes.len() as u64 }
    }

    #[tokio::test]
    async fn files_are_read_by_id_and_checked_by_the_first_read() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..70_001_u32).map(|i| (i % 251) as u8).collect();
        let good = shard_file(dir.path(), "good.bin", &bytes);
        let reader = DirReader::new([good.clone()]);
        let found = reader.read(ReadRequest::token(good.shard, range(20_000, 50_001))).await;
        let found = found.unwrap();
        assert_eq!(
            (found.bytes.to_vec(), found.tier),
            (bytes[20_000..50_001].to_vec(), Tier::Disk)
        );
        let past = reader.read(ReadRequest::token(good.shard, range(0, 70_002))).await;
        assert!(matches!(past, Err(ReadError::OutOfRange { size: 70_001, .. })));
        let unknown = reader.read(ReadRequest::token(ShardId::of(b"?"), range(0, 1))).await;
        assert!(matches!(unknown, Err(ReadError::NotFound { .. })));
        // The file changes after the check: only the changed group is refused.
        let mut changed = bytes.clone();
        changed[40_000] ^= 1;
        fs::write(&good.path, changed).unwrap();
        let bad = reader.read(ReadRequest::token(good.shard, range(40_000, 40_001))).await;
        assert!(matches!(bad, Err(ReadError::Corrupt { .. })));
        assert!(reader.read(ReadRequest::token(good.shard, range(0, 100))).await.is_ok());
    }

    #[tokio::test]
    async fn missing_short_and_foreign_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut missing = shard_file(dir.path(), "missing.bin", b"missing");
        missing.path.set_extension("gone");
        let mut short = shard_file(dir.path(), "short.bin", b"short");
        short.size = 6;
        let mut foreign = shard_file(dir.path(), "foreign.bin", b"foreign");
        foreign.shard = ShardId::of(b"native");
        let shards = [missing, short, foreign];
        let reader = DirReader::new(shards.clone());
        for (shard, label) in shards.iter().zip(["io", "corrupt", "corrupt"]) {
            for _ in 0..2 {
                let read = reader.read(ReadRequest::token(shard.shard, range(0, 5))).await;
                let error = read.unwrap_err();
                assert_eq!(error.label(), label);
                let name = shard.path.file_name().unwrap().to_str().unwrap();
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }

    #[tokio::test]
    async fn memory_is_read_by_id() {
        let memory = MemReader::new();
        let seen = memory.changes();
        let shard = memory.insert(Bytes::from_static(b"twelve bytes")).unwrap();
        assert!(seen.has_changed().unwrap());
        assert_eq!(memory.ids(), [shard]);
        let found = memory.read(ReadRequest::token(shard, range(2, 6))).await.unwrap();
        assert_eq!((&found.bytes[..], found.tier), (&b"elve"[..], Tier::Ram));
        let past = memory.read(ReadRequest::token(shard, range(2, 13))).await;
        assert!(matches!(past, Err(ReadError::OutOfRange { size: 12, .. })));
    }
}
