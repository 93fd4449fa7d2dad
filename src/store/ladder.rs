//! The ladder: reads through RAM, disk, local sources and peers, in this order.
//!
//! Decides which tier to ask, and which tiers keep what was read. Bytes from
//! peers are kept on disk. What was read is also kept in RAM, except by bulk
//! reads: a scan must not flush what decoding uses. Readers of one range share one
//! flight. Invariant: every byte returned was verified when it entered. Bytes that
//! wait to be written to disk are bounded. When the disk cannot keep up, bulk
//! reads and prefetches wait for it, and what a token waits for is not kept there.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::sync::{Semaphore, watch};

use super::dir::MemReader;
use super::disk::{DiskStats, DiskTier, Imported, Kept};
use super::error::StoreError;
use super::flights::{Flights, copy_error};
use super::groups::Chunks;
use super::ram::RamTier;
use super::verified::{
    DECODE_BYTES_MAX, Encoded, GROUP_BYTES, OBJECT_BYTES_MAX, SERVE_BYTES_MAX, VerifiedRange,
};
use super::{
    ByteRange, Found, Priority, RangeReader, ReadError, ReadRequest, Served, ShardId, ShardServe,
    ShardSource, Tier,
};

/// The most bytes from peers that may wait to be written to disk.
const WRITE_BEHIND_BYTES: u64 = 64 * 1024 * 1024;

/// Pieces of one read that are requested from peers at a time.
const PIECES_IN_FLIGHT: usize = 4;

/// How often a reader starts over when the deadline of a flight that it joined passes.
const REJOIN_MAX: usize = 4;

/// Options of a [`Ladder`].
#[derive(Debug, Clone, Copy)]
pub struct LadderOptions {
    /// The most bytes of the RAM tier.
    pub ram_budget: u64,
}

/// Reads answered by one tier, and the bytes that came from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TierStats {
    /// Reads whose slowest part came from this tier.
    pub hits: u64,
    /// Bytes read from it, rounded up to whole groups where they were verified.
    pub bytes: u64,
}

/// What the ladder has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LadderStats {
    pub ram: TierStats,
    pub disk: TierStats,
    pub peer: TierStats,
    pub ram_used_bytes: u64,
    pub ram_budget_bytes: u64,
    pub ram_evictions: u64,
    /// Reads that found damage on disk and were answered by a peer.
    pub repaired_reads: u64,
    /// Bytes fetched to replace damaged groups, beyond what readers asked for.
    pub repaired_bytes: u64,
    /// Ranges from peers that were not kept on disk, for lack of room or because the disk
    /// could not keep up.
    pub not_kept: u64,
    pub disk_tier: Option<DiskStats>,
}

/// The tiers of a node. Clones share them.
#[derive(Clone)]
pub struct Ladder {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    ram: Mutex<RamTier>,
    memory: MemReader,
    pub disk: Option<Arc<DiskTier>>,
    local: RwLock<Vec<Arc<dyn RangeReader>>>,
    peers: RwLock<Option<Arc<dyn ShardSource>>>,
    sizes: Mutex<HashMap<ShardId, u64>>,
    /// Objects being repaired.
    pub repairing: Mutex<HashSet<ShardId>>,
    flights: Arc<Flights>,
    /// One permit per group that may wait to be written.
    write_behind: Arc<Semaphore>,
    pub counts: Counts,
}

#[derive(Default)]
pub(super) struct Counts {
    hits: [AtomicU64; 3],
    bytes: [AtomicU64; 3],
    repaired_reads: AtomicU64,
    pub repaired_bytes: AtomicU64,
    not_kept: Arc<AtomicU64>,
}

impl Counts {
    fn slot(tier: Tier) -> usize {
        match tier {
            Tier::Vram | Tier::Ram => 0,
            Tier::Disk => 1,
            Tier::Peer => 2,
        }
    }

    fn hit(&self, tier: Tier) {
        self.hits[Self::slot(tier)].fetch_add(1, Ordering::Relaxed);
    }

    fn bytes(&self, tier: Tier, bytes: usize) {
        self.bytes[Self::slot(tier)].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn tier(&self, tier: Tier) -> TierStats {
        let slot = Self::slot(tier);
        TierStats {
            hits: self.hits[slot].load(Ordering::Relaxed),
            bytes: self.bytes[slot].load(Ordering::Relaxed),
        }
    }
}

impl Ladder {
    /// Without a disk tier, stored objects stay in memory, within the RAM budget.
    pub fn new(
        options: LadderOptions,
        disk: Option<Arc<DiskTier>>,
        peers: Option<Arc<dyn ShardSource>>,
        local: Vec<Arc<dyn RangeReader>>,
    ) -> Self {
        let permits = (WRITE_BEHIND_BYTES / GROUP_BYTES) as usize;
        let inner = Inner {
            ram: Mutex::new(RamTier::new(options.ram_budget)),
            memory: MemReader::new(),
            disk,
            local: RwLock::new(local),
            peers: RwLock::new(peers),
            sizes: Mutex::default(),
            repairing: Mutex::default(),
            flights: Arc::default(),
            write_behind: Arc::new(Semaphore::new(permits)),
            counts: Counts::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Sets or replaces the tier below the disk. The mesh is created after the ladder.
    pub fn set_peers(&self, peers: Arc<dyn ShardSource>) {
        *self.inner.peers.write().unwrap_or_else(PoisonError::into_inner) = Some(peers);
    }

    /// Adds a local source, asked after the disk tier.
    pub fn add_local(&self, reader: Arc<dyn RangeReader>) {
        self.inner.local.write().unwrap_or_else(PoisonError::into_inner).push(reader);
    }

    /// Records the sizes in bytes that a trusted manifest gives its shards. Ranges
    /// from peers that claim another size are then refused.
    pub fn expect_sizes(&self, sizes: impl IntoIterator<Item = (ShardId, u64)>) {
        lock(&self.inner.sizes).extend(sizes);
    }

    /// Forgets the sizes of objects that no known model names any more.
    pub fn forget_sizes(&self, shards: &[ShardId]) {
        let mut sizes = lock(&self.inner.sizes);
        for shard in shards {
            sizes.remove(shard);
        }
    }

    /// The size in bytes that a manifest gives an object.
    pub fn expected_size(&self, shard: ShardId) -> Option<u64> {
        self.inner.expected_size(shard)
    }

    /// Stores an object. It is durable on return if there is a disk tier.
    pub async fn put(&self, bytes: Bytes, pin: bool) -> Result<ShardId, StoreError> {
        if let Some(disk) = &self.inner.disk {
            return disk.put(bytes, pin).await;
        }
        let (shard, needed) = (ShardId::of(&bytes), bytes.len() as u64);
        if !self.inner.memory.contains(shard) {
            let reserved = lock(&self.inner.ram).reserve(needed);
            reserved.map_err(|available| StoreError::Memory { needed, available })?;
            self.inner.memory.insert(bytes)?;
        }
        Ok(shard)
    }

    /// Stores a file of known id on disk, without copying it if possible.
    pub async fn import_file(
        &self,
        path: PathBuf,
        expected: ShardId,
        pin: bool,
    ) -> Result<Imported, StoreError> {
        let disk = self.inner.disk.as_ref().ok_or(StoreError::NoDisk("import files"))?;
        disk.import(path, expected, pin).await
    }

    /// A whole object of known size in bytes (a manifest, a tokenizer file). Its
    /// hash is checked once more, because a wrong size could truncate it.
    pub async fn get_whole(
        &self,
        shard: ShardId,
        size: u64,
        priority: Priority,
        deadline: Option<Instant>,
    ) -> Result<Bytes, ReadError> {
        let bytes = match ByteRange::new(0, size) {
            Some(range) => self.read(ReadRequest { shard, range, priority, deadline }).await?.bytes,
            None => Bytes::new(),
        };
        if ShardId::of(&bytes) != shard {
            let detail = format!("it does not have {size} bytes");
            return Err(ReadError::Corrupt { shard, detail });
        }
        Ok(bytes)
    }

    /// Reads a range and holds it in RAM until [`Self::unpin_in_ram`]. `Refused`
    /// if it does not fit the RAM budget beside what is pinned and reserved.
    pub async fn pin_in_ram(&self, request: ReadRequest) -> Result<Found, ReadError> {
        let found = self.read(request).await?;
        let (shard, range) = (request.shard, request.range);
        lock(&self.inner.ram).pin(shard, range, found.bytes.clone()).map_err(|available| {
            let needed = range.len();
            ReadError::Refused(StoreError::Memory { needed, available }.to_string())
        })?;
        Ok(found)
    }

    /// Undoes one [`Self::pin_in_ram`] of a range. False if it was not pinned.
    pub fn unpin_in_ram(&self, shard: ShardId, range: ByteRange) -> bool {
        lock(&self.inner.ram).unpin(shard, range)
    }

    /// Removes an object from disk and RAM, pinned or not.
    pub async fn remove(&self, shard: ShardId) -> Result<(), StoreError> {
        let disk = self.inner.disk.as_ref().ok_or(StoreError::NoDisk("remove objects"))?;
        self.forget_in_ram(shard);
        disk.remove(shard).await
    }

    /// Drops what RAM holds of an object, pinned or not.
    pub fn forget_in_ram(&self, shard: ShardId) {
        lock(&self.inner.ram).forget(shard);
    }

    pub fn disk(&self) -> Option<&Arc<DiskTier>> {
        self.inner.disk.as_ref()
    }

    pub fn stats(&self) -> LadderStats {
        let counts = &self.inner.counts;
        let ram = lock(&self.inner.ram);
        LadderStats {
            ram: counts.tier(Tier::Ram),
            disk: counts.tier(Tier::Disk),
            peer: counts.tier(Tier::Peer),
            ram_used_bytes: ram.used(),
            ram_budget_bytes: ram.budget(),
            ram_evictions: ram.evictions(),
            repaired_reads: counts.repaired_reads.load(Ordering::Relaxed),
            repaired_bytes: counts.repaired_bytes.load(Ordering::Relaxed),
            not_kept: counts.not_kept.load(Ordering::Relaxed),
            disk_tier: self.inner.disk.as_ref().map(|disk| disk.stats()),
        }
    }

    /// Waits for pending writes and makes them durable.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let Some(disk) = &self.inner.disk else { return Ok(()) };
        let all = (WRITE_BEHIND_BYTES / GROUP_BYTES) as u32;
        // The semaphore is never closed, so this cannot fail.
        drop(self.inner.write_behind.acquire_many(all).await);
        disk.flush().await
    }
}

impl RangeReader for Ladder {
    /// A read whose deadline passes ends with `Deadline`, whichever tier it was
    /// waiting for. What RAM holds is returned even after the deadline.
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, Result<Found, ReadError>> {
        async move {
            let ReadRequest { shard, range, deadline, .. } = request;
            if range.end() > OBJECT_BYTES_MAX {
                return Err(ReadError::OutOfRange { shard, range, size: OBJECT_BYTES_MAX });
            }
            if let Some(found) = self.inner.in_memory(shard, range) {
                return found;
            }
            let Some(deadline) = deadline else { return self.read_shared(request).await };
            let started = Instant::now();
            let late = |detail: &str| {
                let waited = started.elapsed();
                ReadError::Deadline { shard, waited, detail: detail.to_owned() }
            };
            if deadline <= started {
                return Err(late("the deadline had passed when the read began"));
            }
            let read = self.read_shared(request);
            match tokio::time::timeout_at(deadline.into(), read).await {
                Ok(done) => done,
                Err(_) => Err(late("neither disk nor peers had answered")),
            }
        }
        .boxed()
    }
}

impl Ladder {
    /// Joins or starts a flight through the tiers below RAM, and waits for it.
    async fn read_shared(&self, request: ReadRequest) -> Result<Found, ReadError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let start = || Arc::clone(&self.inner).read_below_ram(request).boxed();
            let (flight, joined) = self.inner.flights.join_or_start(request, start);
            match flight.await {
                Ok(found) => {
                    self.inner.counts.hit(found.tier);
                    return Ok(found);
                }
                // The deadline of the flight passed, not this reader's.
                Err(error)
                    if joined
                        && tries < REJOIN_MAX
                        && matches!(*error, ReadError::Deadline { .. }) => {}
                Err(error) => return Err(copy_error(&error)),
            }
        }
    }
}

impl Ladder {
    /// A locally held range, for a peer.
    async fn prove(&self, shard: ShardId, range: ByteRange) -> Result<VerifiedRange, ReadError> {
        if range.len() > SERVE_BYTES_MAX {
            let what = format!("{} bytes in one request, more than {SERVE_BYTES_MAX}", range.len());
            return Err(ReadError::Refused(what));
        }
        if let Some(disk) = &self.inner.disk {
            match disk.read(shard, range).await {
                Ok(Some(proved)) => return Ok(proved),
                Ok(None) => {}
                Err(error) => {
                    // The peer turns to another provider, and so does this node for its own copy.
                    if matches!(error, ReadError::Corrupt { .. }) {
                        self.inner.repair_in_background(shard, None);
                    }
                    return Err(error);
                }
            }
        }
        let Some(whole) = self.inner.memory.whole(shard) else {
            return Err(ReadError::NotFound { shard, waited: Duration::ZERO });
        };
        let size = whole.bytes().len() as u64;
        // The object was hashed when it was stored, so only an outside range can fail.
        whole.range(range).map_err(|_| ReadError::OutOfRange { shard, range, size })
    }
}

impl ShardServe for Ladder {
    fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> BoxFuture<'_, Result<Encoded, ReadError>> {
        async move { Ok(self.prove(shard, range).await?.encode()) }.boxed()
    }

    fn serve(&self, shard: ShardId, range: ByteRange) -> BoxFuture<'_, Result<Served, ReadError>> {
        async move { Ok(Served::Proved(self.prove(shard, range).await?)) }.boxed()
    }

    fn complete(&self) -> Vec<ShardId> {
        match &self.inner.disk {
            Some(disk) => disk.complete(),
            None => self.inner.memory.ids(),
        }
    }

    fn partial(&self, max: usize) -> Vec<(ShardId, Chunks)> {
        self.inner.disk.as_ref().map_or_else(Vec::new, |disk| disk.partial(max))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        match &self.inner.disk {
            Some(disk) => disk.changes(),
            None => self.inner.memory.changes(),
        }
    }
}

impl Inner {
    /// A read that RAM answers.
    fn in_memory(&self, shard: ShardId, range: ByteRange) -> Option<Result<Found, ReadError>> {
        let cached = lock(&self.ram).get(shard, range).map(Ok);
        let bytes = match cached.or_else(|| self.memory.get(shard, range))? {
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(error)),
        };
        self.counts.hit(Tier::Ram);
        self.counts.bytes(Tier::Ram, bytes.len());
        // What is hot in RAM must not look cold on disk.
        if let Some(disk) = &self.disk {
            disk.note_use(shard);
        }
        Some(Ok(Found { bytes, tier: Tier::Ram }))
    }

    /// The body of one flight: asks the tiers below RAM, fastest first.
    async fn read_below_ram(self: Arc<Self>, request: ReadRequest) -> Result<Found, ReadError> {
        let ReadRequest { shard, range, .. } = request;
        // Another flight may have filled RAM since the reader looked there.
        let landed = lock(&self.ram).get(shard, range);
        if let Some(bytes) = landed {
            self.counts.bytes(Tier::Ram, bytes.len());
            return Ok(Found { bytes, tier: Tier::Ram });
        }
        let mut fault = None;
        if let Some(disk) = &self.disk {
            match disk.read(shard, range).await {
                Ok(Some(proved)) => {
                    self.counts.bytes(Tier::Disk, proved.bytes().len());
                    return self.found(request, &proved, Tier::Disk);
                }
                Ok(None) => {}
                Err(error @ ReadError::OutOfRange { .. }) => return Err(error),
                Err(error) => fault = Some(error),
            }
        }
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner).clone();
        for reader in local {
            match reader.read(request).await {
                Ok(found) => {
                    self.counts.bytes(found.tier, found.bytes.len());
                    if found.tier != Tier::Ram {
                        self.promote(request, &found.bytes);
                    }
                    return Ok(found);
                }
                Err(ReadError::NotFound { .. }) => {}
                Err(error @ ReadError::OutOfRange { .. }) => return Err(error),
                Err(error) => fault = Some(error),
            }
        }
        let Some(peers) = self.peers() else {
            let waited = Duration::ZERO;
            return Err(fault.unwrap_or(ReadError::NotFound { shard, waited }));
        };
        match self.read_from_peers(&peers, request).await {
            Ok(found) => {
                if let Some(fault) = fault {
                    self.counts.repaired_reads.fetch_add(1, Ordering::Relaxed);
                    tracing::info!(%shard, %range, %fault, "a peer answered instead of the damaged disk copy");
                    // The range fetched for this reader is already on its way to disk.
                    self.repair_in_background(shard, Some(range));
                }
                Ok(found)
            }
            // A local fault says more than that no peer has the object.
            Err(ReadError::NotFound { shard, waited }) => {
                Err(fault.unwrap_or(ReadError::NotFound { shard, waited }))
            }
            Err(error) => Err(error),
        }
    }

    /// Fetches a range from peers in pieces of at most one wire request each. Reads
    /// the pieces that are on disk from there.
    async fn read_from_peers(
        &self,
        peers: &Arc<dyn ShardSource>,
        request: ReadRequest,
    ) -> Result<Found, ReadError> {
        let ReadRequest { shard, range, .. } = request;
        let pieces = self.pieces(shard, range).await;
        if let [(piece, false)] = pieces[..] {
            let proved = self.fetch(peers, ReadRequest { range: piece, ..request }).await?;
            return self.found(request, &proved, Tier::Peer);
        }
        let parts: Vec<(VerifiedRange, ByteRange)> = futures::stream::iter(pieces)
            .map(|(piece, held)| async move {
                let on_disk = match &self.disk {
                    Some(disk) if held => disk.read(shard, piece).await.unwrap_or(None),
                    _ => None,
                };
                if let Some(proved) = on_disk {
                    self.counts.bytes(Tier::Disk, proved.bytes().len());
                    return Ok((proved, piece));
                }
                let proved = self.fetch(peers, ReadRequest { range: piece, ..request }).await?;
                Ok::<_, ReadError>((proved, piece))
            })
            .buffered(PIECES_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut bytes = BytesMut::with_capacity(range.len() as usize);
        for (proved, piece) in &parts {
            let from = piece.start().max(range.start());
            let part = ByteRange::new(from, piece.end().min(range.end()))
                .and_then(|wanted| proved.slice(wanted));
            bytes.extend_from_slice(&part.unwrap_or_default());
        }
        let bytes = bytes.freeze();
        if bytes.len() as u64 != range.len() {
            let size = parts.last().map_or(0, |(proved, _)| proved.size());
            return Err(ReadError::OutOfRange { shard, range, size });
        }
        self.promote(request, &bytes);
        Ok(Found { bytes, tier: Tier::Peer })
    }

    /// The range cut at group boundaries into pieces, each with whether it is on disk.
    async fn pieces(&self, shard: ShardId, range: ByteRange) -> Vec<(ByteRange, bool)> {
        if let Some(disk) = &self.disk
            && let Some(groups) = disk.groups(shard).await
            && range.end() <= groups.size()
        {
            return groups.runs(range, SERVE_BYTES_MAX);
        }
        let mut pieces = Vec::new();
        let mut start = range.start() / GROUP_BYTES * GROUP_BYTES;
        while let Some(piece) = ByteRange::new(start, (start + SERVE_BYTES_MAX).min(range.end())) {
            pieces.push((piece, false));
            start = piece.end();
        }
        pieces
    }

    /// Sends one wire request and keeps its result on disk in the background.
    async fn fetch(
        &self,
        peers: &Arc<dyn ShardSource>,
        request: ReadRequest,
    ) -> Result<VerifiedRange, ReadError> {
        let proved = self.fetch_only(peers, request).await?;
        self.keep(&proved, request.priority).await;
        Ok(proved)
    }

    /// Sends one wire request and checks its result against what is known of the object.
    pub async fn fetch_only(
        &self,
        peers: &Arc<dyn ShardSource>,
        request: ReadRequest,
    ) -> Result<VerifiedRange, ReadError> {
        let ReadRequest { shard, range, .. } = request;
        let proved = peers.fetch(request).await?;
        let size = proved.size();
        if let Some(expected) = self.expected_size(shard).filter(|expected| *expected != size) {
            let detail =
                format!("a peer says it has {size} bytes, but its manifest says {expected}");
            return Err(ReadError::Corrupt { shard, detail });
        }
        if range.end() > size {
            return Err(ReadError::OutOfRange { shard, range, size });
        }
        if proved.shard() != shard || !proved.range().contains(&range) {
            let detail = format!("asked for {range}, got {} of {}", proved.range(), proved.shard());
            return Err(ReadError::Corrupt { shard, detail });
        }
        self.counts.bytes(Tier::Peer, proved.bytes().len());
        Ok(proved)
    }

    pub fn peers(&self) -> Option<Arc<dyn ShardSource>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The size that a trusted manifest gives an object.
    pub fn expected_size(&self, shard: ShardId) -> Option<u64> {
        lock(&self.sizes).get(&shard).copied()
    }

    /// Hands a range to the disk tier. The reader does not wait for the write.
    async fn keep(&self, proved: &VerifiedRange, priority: Priority) {
        let Some(disk) = self.disk.clone() else { return };
        let groups = proved.range().len().div_ceil(GROUP_BYTES);
        let permits = groups.min(WRITE_BEHIND_BYTES / GROUP_BYTES) as u32;
        let waiting = Arc::clone(&self.write_behind);
        let permit = if priority == Priority::Token {
            waiting.try_acquire_many_owned(permits).ok()
        } else {
            waiting.acquire_many_owned(permits).await.ok()
        };
        let not_kept = Arc::clone(&self.counts.not_kept);
        let Some(permit) = permit else {
            not_kept.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let proved = proved.clone();
        tokio::spawn(async move {
            let (shard, range) = (proved.shard(), proved.range());
            match disk.keep(proved).await {
                Ok(Kept::Part | Kept::Whole | Kept::Already) => {}
                Ok(Kept::SizeConflict) => {
                    not_kept.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    not_kept.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%shard, %range, %error, "not kept on disk");
                }
            }
            drop(permit);
        });
    }

    fn found(
        &self,
        request: ReadRequest,
        proved: &VerifiedRange,
        tier: Tier,
    ) -> Result<Found, ReadError> {
        let ReadRequest { shard, range, .. } = request;
        let size = proved.size();
        let bytes = proved.slice(range).ok_or(ReadError::OutOfRange { shard, range, size })?;
        // A short slice would keep its whole groups in memory without counting them.
        let slack = proved.range().len() - range.len();
        let bytes = if slack > range.len() / 8 { Bytes::copy_from_slice(&bytes) } else { bytes };
        self.promote(request, &bytes);
        Ok(Found { bytes, tier })
    }

    /// Keeps bytes in RAM, except those of bulk reads that the disk tier holds.
    fn promote(&self, request: ReadRequest, bytes: &Bytes) {
        if request.priority != Priority::Bulk || self.disk.is_none() {
            lock(&self.ram).insert(request.shard, request.range, bytes.clone());
        }
    }
}

const _: () = assert!(SERVE_BYTES_MAX + 2 * GROUP_BYTES <= DECODE_BYTES_MAX);

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
