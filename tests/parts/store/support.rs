//! Seeded objects, a source whose replies can be held back, and helpers for
//! directories.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use doppler_store::verified::{self, Outboard, VerifiedRange};
use doppler_store::{
    ByteRange, DiskOptions, DiskTier, ReadError, ReadRequest, ShardId, ShardSource,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Semaphore;

pub const G: u64 = verified::GROUP_BYTES;

/// A generator whose seed is printed, so that a failure can be reproduced.
pub fn fresh_rng() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

pub fn random(rng: &mut StdRng, len: u64) -> Bytes {
    let mut bytes = vec![0; len as usize];
    rng.fill_bytes(&mut bytes);
    Bytes::from(bytes)
}

pub fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

pub fn part(bytes: &Bytes, range: ByteRange) -> Bytes {
    bytes.slice(range.start() as usize..range.end() as usize)
}

/// The verified range that a peer holding `bytes` would send.
pub fn proved(bytes: &Bytes, want: ByteRange) -> VerifiedRange {
    let outboard = Outboard::of(bytes).unwrap();
    let grown = verified::align(want, bytes.len() as u64).unwrap();
    outboard.prove(grown, part(bytes, grown)).unwrap()
}

/// As [`proved`], claiming another size.
pub fn proved_as(bytes: &Bytes, want: ByteRange, size: u64) -> VerifiedRange {
    let encoded = proved(bytes, want).encode().bytes.to_vec();
    let shard = ShardId::of(bytes);
    futures::executor::block_on(verified::decode(shard, size, want, &mut &encoded[..])).unwrap()
}

pub fn open(dir: &Path, budget: u64) -> DiskTier {
    DiskTier::open(dir, DiskOptions { budget }).unwrap()
}

/// A copy of the directory as a process killed right now would leave it.
pub fn as_if_killed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(dir, copy.path());
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else if entry.file_name() != "lock" {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// An object's file, `suffix` being "", ".part", ".have", ".obao" or ".pin".
pub fn object_file(dir: &Path, shard: ShardId, suffix: &str) -> PathBuf {
    let name = format!("{shard}{suffix}");
    dir.join("objects").join(&name[..2]).join(name)
}

pub fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

/// A peer that holds objects, records requests, and can be held back.
pub struct Source {
    pub objects: HashMap<ShardId, Bytes>,
    pub asked: Mutex<Vec<ReadRequest>>,
    /// Each reply takes a permit.
    pub gate: Arc<Semaphore>,
    /// Replies that were cancelled before they were sent.
    pub dropped: Arc<Semaphore>,
    pub lie: Option<u64>,
}

impl Source {
    pub fn new(objects: impl IntoIterator<Item = Bytes>) -> Self {
        Self {
            objects: objects.into_iter().map(|b| (ShardId::of(&b), b)).collect(),
            asked: Mutex::default(),
            gate: Arc::new(Semaphore::new(1000)),
            dropped: Arc::new(Semaphore::new(0)),
            lie: None,
        }
    }

    /// A source that answers nothing until `gate` gets permits.
    pub fn held_back(objects: impl IntoIterator<Item = Bytes>) -> Self {
        Self { gate: Arc::new(Semaphore::new(0)), ..Self::new(objects) }
    }

    pub fn asked_ranges(&self) -> Vec<ByteRange> {
        self.asked.lock().unwrap().iter().map(|request| request.range).collect()
    }
}

struct Drops(Option<Arc<Semaphore>>);

impl Drops {
    fn sent(&mut self) {
        self.0 = None;
    }
}

impl Drop for Drops {
    fn drop(&mut self) {
        if let Some(dropped) = &self.0 {
            dropped.add_permits(1);
        }
    }
}

impl ShardSource for Source {
    fn fetch(&self, request: ReadRequest) -> BoxFuture<'_, Result<VerifiedRange, ReadError>> {
        self.asked.lock().unwrap().push(request);
        let mut drops = Drops(Some(Arc::clone(&self.dropped)));
        async move {
            self.gate.acquire().await.unwrap().forget();
            drops.sent();
            let shard = request.shard;
            let Some(bytes) = self.objects.get(&shard) else {
                return Err(ReadError::NotFound { shard, waited: Duration::ZERO });
            };
            Ok(match self.lie {
                Some(size) => proved_as(bytes, request.range, size),
                None => proved(bytes, request.range),
            })
        }
        .boxed()
    }
}

/// A store as a peer of another one: what it serves is verified on arrival.
pub struct Neighbour(pub doppler_store::Ladder);

impl ShardSource for Neighbour {
    fn fetch(&self, request: ReadRequest) -> BoxFuture<'_, Result<VerifiedRange, ReadError>> {
        async move {
            let encoded =
                doppler_store::ShardServe::encode(&self.0, request.shard, request.range).await?;
            let mut body = &encoded.bytes[..];
            let size = encoded.size;
            let decoded = verified::decode(request.shard, size, request.range, &mut body).await;
            Ok(decoded.unwrap())
        }
        .boxed()
    }
}

/// The device number and inode number of a file.
#[cfg(unix)]
pub fn device(path: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).unwrap();
    (meta.dev(), meta.ino())
}
