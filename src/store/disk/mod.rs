//! The disk tier: objects, whole or in part, as plain files named by hash (see
//! `files` for the layout), within a byte budget.
//!
//! Owns one data directory, locked against a second process. Promises:
//!
//! - Every read verifies the bytes that it returns against the object's id.
//! - What `put`, `import` and `flush` report stored survives a crash.
//! - A pinned object is never evicted. It is pinned as long as a model or its own pin says so.
//! - Damaged groups never reach a reader. They are quarantined, which means that
//!   they no longer count as held and can be fetched again.
//!
//! Blocking work runs on tokio's blocking threads. Lock order: the lock on pins, an
//! object's lock, then the table's. No thread holds the locks of two objects at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;

mod check;
mod collect;
mod copies;
mod load;
mod pinning;
mod read;
mod table;
mod write;

pub use self::check::Checkup;
pub use self::collect::Collected;
pub use self::pinning::Hold;
pub use super::files::{ImportMethod, object_path};
pub use super::pins::ModelPin;

use self::copies::Guard;
use self::table::{Outboards, Table};
use super::error::StoreError;
use super::files::{self, Layout};
use super::groups::{Chunks, Groups};
use super::index::{Index, Record};
use super::object::{self, Held};
use super::policy::Policy;
use super::reserve::{RESERVE_BYTES, Reserve};
use super::segmented::Segmented;
use super::verified::{VerifiedRange, outboard_bytes};
use super::{ByteRange, ModelId, ReadError, ShardId};

/// Outboards of whole objects cached in memory, bytes. A 64 MiB shard's outboard is 256 KiB.
const OUTBOARD_CACHE_BYTES: u64 = 16 * 1024 * 1024;

/// Uses recorded in memory before they are written to the index in one batch.
const USES_BATCH: usize = 256;

/// How often an operation starts over because its object was evicted meanwhile,
/// or because another operation took the room it had made.
const RETRIES_MAX: usize = 8;

/// Options of a [`DiskTier`].
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// The most bytes of objects and outboards to keep.
    pub budget: u64,
}

/// What a disk tier holds and has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DiskStats {
    pub whole_objects: u64,
    pub part_objects: u64,
    /// Bytes counted against the budget.
    pub used_bytes: u64,
    /// How many of `used_bytes` are pinned.
    pub pinned_bytes: u64,
    pub budget_bytes: u64,
    pub evictions: u64,
    /// How often damage was found in an object and quarantined.
    pub quarantines: u64,
    /// Bytes of the groups quarantined.
    pub damaged_bytes: u64,
    /// Whether space is reserved for cleaning up a full disk.
    pub reserve_held: bool,
}

/// What is held of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectInfo {
    pub shard: ShardId,
    /// The object's size in bytes.
    pub size: u64,
    /// How many of its bytes are held.
    pub held: u64,
    pub whole: bool,
    pub pinned: bool,
}

/// A file taken into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// Bytes.
    pub size: u64,
    /// `None` if the object was held already.
    pub how: Option<ImportMethod>,
}

/// What [`DiskTier::keep`] did with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It was written; the object is not whole yet.
    Part,
    /// It was written and the object is whole.
    Whole,
    /// It was held already.
    Already,
    /// Its object size differs from that of the bytes held, and it does not prove its own.
    SizeConflict,
}

/// The disk tier. Clones share it; the directory is unlocked with the last one.
#[derive(Clone)]
pub struct DiskTier {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    root: PathBuf,
    budget: u64,
    reserve: Reserve,
    index: Index,
    table: Mutex<Table>,
    outboards: Mutex<Outboards>,
    /// Held while records of what models pin change; see `pinning`.
    pinning: Mutex<()>,
    changes: watch::Sender<u64>,
    uses: AtomicU64,
    _lock: File,
}

struct Object {
    held: RwLock<Held>,
    /// Groups read since the store was opened: reading one again makes the
    /// object hot, reading the next one does not.
    seen: Mutex<Option<Groups>>,
}

impl Object {
    fn new(held: Held) -> Self {
        Self { held: RwLock::new(held), seen: Mutex::default() }
    }

    /// Notes a read of whole groups of an object of `size` bytes. True if all
    /// of them were read before.
    fn note_read(&self, size: u64, range: ByteRange) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = match &mut *seen {
            Some(seen) if seen.size() == size => seen,
            other => other.insert(Groups::none(size)),
        };
        let again = seen.holds(range);
        seen.set(range);
        again
    }
}

/// A use of an object, as the policy counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Written, or read for the first time.
    First,
    /// Read again: it is worth more than what is read once.
    Again,
}

impl DiskTier {
    /// Opens (or makes) the store in `dir`. Blocks: it lists the directory.
    /// A store on a full disk opens too, so that it can be read and cleaned.
    pub fn open(dir: &Path, options: DiskOptions) -> Result<Self, StoreError> {
        Self::with_policy(dir, options, Box::new(Segmented::new(options.budget)))
    }

    pub fn with_policy(
        dir: &Path,
        options: DiskOptions,
        policy: Box<dyn Policy<ShardId>>,
    ) -> Result<Self, StoreError> {
        Self::with_guard(dir, options, policy, Guard::Nothing)
    }

    fn with_guard(
        dir: &Path,
        options: DiskOptions,
        policy: Box<dyn Policy<ShardId>>,
        guard: Guard,
    ) -> Result<Self, StoreError> {
        let lock = files::lock(dir)?;
        let layout = Layout::create(dir)?;
        let reserve = Reserve::of(dir, options.budget.min(RESERVE_BYTES));
        let room = match layout.probe() {
            Err(StoreError::Full { .. }) if reserve.release() => layout.probe(),
            probed => probed,
        };
        let (index, records) = match room {
            Ok(()) => Index::open(&layout.index_dir()),
            Err(error @ StoreError::Full { .. }) => {
                tracing::warn!(%error, "opened to be read and cleaned only");
                (Index::none(), HashMap::new())
            }
            Err(error) => return Err(error),
        };
        let inner = Inner {
            layout,
            root: dir.to_owned(),
            budget: options.budget,
            reserve,
            index,
            table: Mutex::new(Table::new(policy, guard)),
            outboards: Mutex::default(),
            pinning: Mutex::default(),
            changes: watch::Sender::new(0),
            uses: AtomicU64::new(records.values().map(|r| r.last_use).max().unwrap_or(0)),
            _lock: lock,
        };
        inner.load(records)?;
        inner.set_reserve_aside();
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Reads `range`, extended to whole groups, with its proof. `None` if any of
    /// it is not held. Damaged groups are quarantined and reported as `Corrupt`.
    pub async fn read(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> Result<Option<VerifiedRange>, ReadError> {
        if !self.inner.knows(shard) {
            return Ok(None);
        }
        self.blocking(move |inner| inner.read(shard, range)).await?
    }

    /// Stores a verified range, evicting unpinned objects if needed. It is
    /// durable once the object is whole or after [`Self::flush`].
    pub async fn keep(&self, range: VerifiedRange) -> Result<Kept, StoreError> {
        self.blocking(move |inner| inner.keep(&range)).await?
    }

    /// Stores a whole object. It is durable when this returns.
    pub async fn put(&self, bytes: Bytes, pin: bool) -> Result<ShardId, StoreError> {
        self.blocking(move |inner| inner.put(&bytes, pin)).await?
    }

    /// Stores a file whose BLAKE3 must be `expected`, by a clone, a hard link or
    /// a copy: the first of these that the file system supports. It is durable
    /// when this returns. A linked file is shared with its owner: if they rewrite
    /// it in place, the next read detects that, and the object is repaired in a
    /// copy.
    pub async fn import(
        &self,
        path: PathBuf,
        expected: ShardId,
        pin: bool,
    ) -> Result<Imported, StoreError> {
        self.blocking(move |inner| inner.import(&path, expected, pin)).await?
    }

    /// Checks that these objects (id and size in bytes) would fit if all of them
    /// were pinned; [`StoreError::Budget`] otherwise. Call this before importing
    /// a model's shards.
    pub fn check_room(
        &self,
        objects: impl IntoIterator<Item = (ShardId, u64)>,
    ) -> Result<(), StoreError> {
        let table = self.inner.table();
        let new = objects.into_iter().filter(|(shard, _)| !table.pins.contains(*shard));
        let needed = new.fold(0_u64, |sum, (_, size)| {
            sum.saturating_add(size).saturating_add(outboard_bytes(size))
        });
        let budget = self.inner.budget;
        let available = budget.saturating_sub(table.pinned_bytes());
        if needed > available {
            return Err(StoreError::Budget { needed, available, budget });
        }
        Ok(())
    }

    /// Checks that what is missing of these objects (id and size in bytes) would fit on the
    /// disk, whatever the budget, if everything went that may be evicted; [`StoreError::Full`]
    /// otherwise.
    pub async fn check_space(&self, objects: Vec<(ShardId, u64)>) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.check_space(&objects)).await?
    }

    /// Protects an object from eviction, by itself. [`StoreError::NotHeld`] if none of it
    /// is held.
    pub async fn pin(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.pin(shard)).await?
    }

    /// Adds objects (with their sizes in bytes) to what a model pins, and returns those of
    /// which something is held; only they are pinned. Durable when this returns.
    pub async fn pin_model(
        &self,
        model: ModelId,
        name: String,
        objects: Vec<(ShardId, u64)>,
    ) -> Result<Vec<ShardId>, StoreError> {
        self.blocking(move |inner| inner.pin_model(model, name, &objects)).await?
    }

    /// Forgets what a model pins, and returns it. What nobody else pins may be evicted from
    /// then on.
    pub async fn unpin_model(&self, model: ModelId) -> Result<BTreeMap<ShardId, u64>, StoreError> {
        self.blocking(move |inner| inner.unpin_model(model)).await?
    }

    /// The models that pin anything, and what.
    pub fn model_pins(&self) -> BTreeMap<ModelId, ModelPin> {
        self.inner.table().pins.models().clone()
    }

    /// The models that pin an object.
    pub fn pinned_by(&self, shard: ShardId) -> Vec<ModelId> {
        self.inner.table().pins.models_of(shard)
    }

    /// Keeps these objects from being evicted until the returned value is dropped or the
    /// process ends, whether they are held already or not. They can still be removed.
    pub fn hold(&self, shards: impl IntoIterator<Item = ShardId>) -> Hold {
        let shards: Vec<ShardId> = shards.into_iter().collect();
        let mut table = self.inner.table();
        shards.iter().for_each(|shard| table.pins.hold_back(*shard));
        drop(table);
        Hold { inner: Arc::clone(&self.inner), shards }
    }

    /// Lets go of an object: neither it nor any model pins it afterwards.
    pub async fn unpin(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.unpin(shard)).await?
    }

    /// Removes an object, pinned or not, and its files.
    pub async fn remove(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.remove(shard)).await?
    }

    /// Checks every byte held of an object against its root. Damaged groups are
    /// quarantined, as by a read; a wrong outboard is rebuilt. `None` if none of
    /// the object is held.
    pub async fn check(&self, shard: ShardId) -> Result<Option<Checkup>, StoreError> {
        self.blocking(move |inner| inner.check(shard)).await?
    }

    /// The damage that was found and quarantined when the store was opened.
    pub fn damage_at_open(&self) -> Vec<Checkup> {
        self.inner.table().damage_at_open.clone()
    }

    /// Evicts unpinned objects by policy until the rest fits `budget` bytes (the
    /// store's own budget if `None`), and sets the reserve aside again. With `dry`
    /// it changes nothing and only lists what would go.
    pub async fn collect(&self, budget: Option<u64>, dry: bool) -> Result<Collected, StoreError> {
        self.blocking(move |inner| inner.collect(budget, dry, true)).await?
    }

    /// As [`Self::collect`], but evicts what is guarded, too.
    pub async fn collect_all(
        &self,
        budget: Option<u64>,
        dry: bool,
    ) -> Result<Collected, StoreError> {
        self.blocking(move |inner| inner.collect(budget, dry, false)).await?
    }

    /// Everything held, whole or in part, by id.
    pub async fn list(&self) -> Result<Vec<ObjectInfo>, StoreError> {
        self.blocking(Inner::list).await
    }

    /// Counts a use of an object whose bytes came from a faster tier.
    pub fn note_use(&self, shard: ShardId) {
        self.inner.note_use(shard, Use::Again);
    }

    /// Makes every range stored so far durable and writes the index.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.blocking(|inner| inner.flush()).await?
    }

    /// Ids of the objects held whole.
    pub fn complete(&self) -> Vec<ShardId> {
        self.inner.table().whole.iter().copied().collect()
    }

    /// Objects that are held in part, with at least one whole 1 MiB chunk; at most `max`
    /// of them. Never blocks: an object that is being written is left out.
    pub fn partial(&self, max: usize) -> Vec<(ShardId, Chunks)> {
        let parts: Vec<_> = {
            let table = self.inner.table();
            let parts = table.objects.iter().filter(|(shard, _)| !table.whole.contains(shard));
            parts.map(|(shard, object)| (*shard, Arc::clone(object))).collect()
        };
        let chunks = |(shard, object): (ShardId, Arc<Object>)| {
            let held = object.held.try_read().ok()?;
            let chunks = if held.dead { Chunks::NONE } else { held.groups.chunks() };
            (!chunks.is_none()).then_some((shard, chunks))
        };
        let mut parts: Vec<_> = parts.into_iter().filter_map(chunks).collect();
        parts.sort_unstable_by_key(|(shard, _)| *shard);
        parts.truncate(max);
        parts
    }

    pub fn is_whole(&self, shard: ShardId) -> bool {
        self.inner.table().whole.contains(&shard)
    }

    pub fn is_pinned(&self, shard: ShardId) -> bool {
        self.inner.table().pins.contains(shard)
    }

    /// Which groups of an object are held; `None` if the object is unknown.
    pub async fn groups(&self, shard: ShardId) -> Option<Groups> {
        let object = self.inner.object(shard)?;
        self.blocking(move |_| read_lock(&object.held).groups.clone()).await.ok()
    }

    /// Changes whenever [`Self::complete`] does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    pub fn stats(&self) -> DiskStats {
        let reserve_held = self.inner.reserve.is_held();
        let table = self.inner.table();
        DiskStats {
            whole_objects: table.whole.len() as u64,
            part_objects: (table.objects.len() - table.whole.len().min(table.objects.len())) as u64,
            used_bytes: table.used,
            pinned_bytes: table.pinned_bytes(),
            budget_bytes: self.inner.budget,
            evictions: table.evictions,
            quarantines: table.quarantines,
            damaged_bytes: table.damaged_bytes,
            reserve_held,
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|e| StoreError::io("a file operation was interrupted", io::Error::other(e)))
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn knows(&self, shard: ShardId) -> bool {
        self.table().objects.contains_key(&shard)
    }

    fn object(&self, shard: ShardId) -> Option<Arc<Object>> {
        self.table().objects.get(&shard).cloned()
    }

    fn object_or_new(&self, shard: ShardId, size: u64) -> Arc<Object> {
        let mut table = self.table();
        let new = || Arc::new(Object::new(Held::empty(size)));
        Arc::clone(table.objects.entry(shard).or_insert_with(new))
    }

    fn announce(&self) {
        self.changes.send_modify(|version| *version += 1);
    }

    fn drop_object(&self, shard: ShardId, object: &Object, why: DropWhy) -> Result<(), StoreError> {
        let mut held = write_lock(&object.held);
        if held.dead {
            return Ok(());
        }
        // Pinning takes the object's lock too, so a pin is either visible here or comes after the
        // object is gone.
        let mut table = self.table();
        let is_empty = !held.whole && held.groups.held_bytes() == 0;
        match why {
            DropWhy::Asked => table.pins.remove_alone(shard),
            DropWhy::Gone if table.pins.contains(shard) => return Ok(()),
            DropWhy::Nothing if !is_empty => return Ok(()),
            DropWhy::Room if table.guard.spares(shard) => return Ok(()),
            DropWhy::Room | DropWhy::RoomUnguarded | DropWhy::Nothing
                if table.pins.spare(shard) =>
            {
                return Ok(());
            }
            DropWhy::Room | DropWhy::RoomUnguarded => table.evictions += 1,
            DropWhy::Gone | DropWhy::Nothing => {}
        }
        drop(table);
        held.dead = true;
        self.forget_outboard(shard);
        let erased =
            object::erase(&self.layout, shard).map_err(StoreError::file(&self.layout.dir(shard)));
        let was_whole = self.table().forget(shard);
        drop(held);
        self.index.remove(shard);
        if was_whole {
            self.announce();
        }
        erased
    }

    /// Counts a use in memory only; `write_uses` writes it to the index.
    fn note_use(&self, shard: ShardId, how: Use) {
        let number = self.uses.fetch_add(1, Ordering::Relaxed) + 1;
        let mut table = self.table();
        let Some(cost) = table.policy.cost(&shard) else { return };
        match how {
            Use::First => table.policy.insert(shard, cost),
            Use::Again => {
                table.policy.touch(&shard);
                table.hot.insert(shard);
            }
        }
        table.used_lately.insert(shard, number);
    }

    /// Writes recent uses to the index once there are [`USES_BATCH`] of them.
    fn write_uses_in_batches(&self) {
        let enough = self.table().used_lately.len() >= USES_BATCH;
        if enough {
            self.write_uses();
        }
    }

    fn write_uses(&self) {
        let mut table = self.table();
        let lately = std::mem::take(&mut table.used_lately);
        let of = |is: &dyn Fn(&ShardId) -> bool| -> HashSet<ShardId> {
            lately.keys().filter(|shard| is(shard)).copied().collect()
        };
        let pinned = of(&|shard| table.pins.contains(*shard));
        let hot = of(&|shard| table.hot.contains(shard));
        drop(table);
        let record = |(shard, last_use): (ShardId, u64)| {
            let object = self.object(shard)?;
            // Do not wait for the lock: this thread may hold it, and the record is only a copy.
            let held = object.held.try_read().ok()?;
            let (size, held) = (held.groups.size(), held.groups.held_bytes());
            let (pinned, hot) = (pinned.contains(&shard), hot.contains(&shard));
            Some((shard, Record { size, held, last_use, pinned, hot }))
        };
        self.index.put_all(lately.into_iter().filter_map(record));
    }

    fn flush(&self) -> Result<(), StoreError> {
        let objects: Vec<_> = {
            let table = self.table();
            let parts = table.objects.iter().filter(|(shard, _)| !table.whole.contains(shard));
            parts.map(|(shard, object)| (*shard, Arc::clone(object))).collect()
        };
        for (shard, object) in objects {
            let mut held = write_lock(&object.held);
            if !held.dead {
                object::sync(&self.layout, shard, &mut held)?;
            }
        }
        self.write_uses();
        self.index.flush();
        // A failure is ignored here: opening the store and collecting report it.
        let _ = self.reserve.set_aside();
        Ok(())
    }

    fn set_reserve_aside(&self) {
        if let Err(error) = self.reserve.set_aside() {
            tracing::warn!(dir = %self.root.display(), %error, "no space is reserved for cleaning up");
        }
    }

    fn list(&self) -> Vec<ObjectInfo> {
        let objects: Vec<_> = {
            let table = self.table();
            let one = |(shard, object): (&ShardId, &Arc<Object>)| {
                (*shard, Arc::clone(object), table.pins.contains(*shard))
            };
            table.objects.iter().map(one).collect()
        };
        let info = |(shard, object, pinned): (ShardId, Arc<Object>, bool)| {
            let held = read_lock(&object.held);
            (!held.dead).then(|| ObjectInfo {
                shard,
                size: held.groups.size(),
                held: held.groups.held_bytes(),
                whole: held.whole,
                pinned,
            })
        };
        let mut list: Vec<_> = objects.into_iter().filter_map(info).collect();
        list.sort_unstable_by_key(|info| info.shard);
        list
    }
}

/// Why an object is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DropWhy {
    /// To make room. Does not apply if the object has been pinned or guarded meanwhile.
    Room,
    /// The same, even if it is guarded.
    RoomUnguarded,
    /// On request.
    Asked,
    /// Its files have disappeared. Does not apply if it is pinned.
    Gone,
    /// It is no longer pinned. Applies if nothing of it is held.
    Nothing,
}

fn read_lock(held: &RwLock<Held>) -> std::sync::RwLockReadGuard<'_, Held> {
    held.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock(held: &RwLock<Held>) -> std::sync::RwLockWriteGuard<'_, Held> {
    held.write().unwrap_or_else(PoisonError::into_inner)
}
