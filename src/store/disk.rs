//! The disk tier: objects as plain files named by hash (see `files` for the
//! layout), whole or in part, within a byte budget.
//!
//! Owns one data directory, locked against a second process. Promises: a byte
//! read here was proved against the object's id in this very read; what `put`,
//! `import` and `flush` report stored survives a crash; a pinned object is never
//! evicted; damage that a read finds takes the damaged groups out of what is
//! held (so that they can be fetched again) and never reaches the reader.
//! Blocking work runs on tokio's blocking threads. Lock order: an object's lock,
//! then the table's; no two objects' locks are held at once.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;

use super::error::StoreError;
use super::files::{self, FileKind, Layout};
use super::groups::Groups;
use super::index::{Index, Record};
use super::object::{self, Health, Held, ReadFault};
use super::policy::{Lru, Policy};
use super::verified::{OBJECT_BYTES_MAX, Outboard, VerifiedRange, outboard_bytes};
use super::{ByteRange, ReadError, ShardId};

/// Bytes of outboards of whole objects kept in memory (a 64 MiB shard's is 256 KiB).
const OUTBOARD_CACHE_BYTES: u64 = 16 * 1024 * 1024;

/// Uses noted in memory before they are written to the index together.
const USES_BATCH: usize = 256;

/// How often an operation starts over because the object was evicted under it,
/// or room that was made is taken by another.
const RETRIES_MAX: usize = 8;

/// Options of a [`DiskTier`].
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// Bytes of objects and outboards kept, at most.
    pub budget: u64,
}

/// What a disk tier holds and has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DiskStats {
    pub whole_objects: u64,
    pub part_objects: u64,
    /// Bytes counted against the budget, of which `pinned_bytes` are pinned.
    pub used_bytes: u64,
    pub pinned_bytes: u64,
    pub budget_bytes: u64,
    pub evictions: u64,
    /// Objects in which a read found damage.
    pub quarantines: u64,
}

/// What became of a range offered to [`DiskTier::keep`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It was written; the object is not whole yet.
    Part,
    /// It was written and the object is whole.
    Whole,
    /// It was here already.
    Already,
    /// It claims another size than what is held does, and proves neither.
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
    index: Index,
    table: Mutex<Table>,
    outboards: Mutex<Outboards>,
    changes: watch::Sender<u64>,
    uses: AtomicU64,
    _lock: File,
}

struct Object {
    held: RwLock<Held>,
}

struct Table {
    objects: HashMap<ShardId, Arc<Object>>,
    whole: BTreeSet<ShardId>,
    pinned: HashSet<ShardId>,
    evicting: HashSet<ShardId>,
    policy: Box<dyn Policy<ShardId>>,
    /// Sum of the objects' charges and of room promised to writes under way.
    used: u64,
    /// Objects used since the index was last told, with the use's number.
    used_lately: HashMap<ShardId, u64>,
    evictions: u64,
    quarantines: u64,
}

#[derive(Default)]
struct Outboards {
    nodes: HashMap<ShardId, Outboard>,
    order: Lru<ShardId>,
}

impl DiskTier {
    /// Opens (or makes) the store in `dir`. Blocks: it lists the directory.
    pub fn open(dir: &Path, options: DiskOptions) -> Result<Self, StoreError> {
        Self::with_policy(dir, options, Box::new(Lru::new()))
    }

    pub fn with_policy(
        dir: &Path,
        options: DiskOptions,
        policy: Box<dyn Policy<ShardId>>,
    ) -> Result<Self, StoreError> {
        let lock = files::lock(dir)?;
        let layout = Layout::create(dir)?;
        let (index, records) = Index::open(&layout.index_dir());
        let inner = Inner {
            layout,
            root: dir.to_owned(),
            budget: options.budget,
            index,
            table: Mutex::new(Table::new(policy)),
            outboards: Mutex::default(),
            changes: watch::Sender::new(0),
            uses: AtomicU64::new(records.values().map(|r| r.last_use).max().unwrap_or(0)),
            _lock: lock,
        };
        inner.load(records)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Reads `range` grown to whole groups, with its proof. `None` if any of it
    /// is not held. Damage found is taken out of what is held and reported as
    /// `Corrupt`.
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

    /// Keeps a proved range, evicting unpinned objects for it if need be.
    /// It is durable after the object is whole or after [`Self::flush`].
    pub async fn keep(&self, range: VerifiedRange) -> Result<Kept, StoreError> {
        self.blocking(move |inner| inner.keep(&range)).await?
    }

    /// Stores an object whole; durable when this returns.
    pub async fn put(&self, bytes: Bytes, pin: bool) -> Result<ShardId, StoreError> {
        self.blocking(move |inner| inner.put(&bytes, pin)).await?
    }

    /// Stores a file whose BLAKE3 must be `expected`, by a hard link where the
    /// file system allows, else by a copy; durable when this returns. Returns its size.
    pub async fn import(
        &self,
        path: PathBuf,
        expected: ShardId,
        pin: bool,
    ) -> Result<u64, StoreError> {
        self.blocking(move |inner| inner.import(&path, expected, pin)).await?
    }

    /// Whether `bytes` more of pinned objects fit; the error says what is missing.
    pub fn check_room(&self, bytes: u64) -> Result<(), StoreError> {
        let table = self.inner.table();
        let available = self.inner.budget.saturating_sub(table.pinned_bytes());
        if bytes > available {
            return Err(StoreError::Budget { needed: bytes, available, budget: self.inner.budget });
        }
        Ok(())
    }

    /// Never evict this object, of which something must be held.
    pub async fn pin(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.pin(shard)).await?
    }

    pub async fn unpin(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.unpin(shard)).await?
    }

    /// Removes an object, pinned or not, and its files.
    pub async fn remove(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.remove(shard)).await?
    }

    /// Makes every range kept so far durable and writes the index.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.blocking(|inner| inner.flush()).await?
    }

    /// Ids of the objects held whole.
    pub fn complete(&self) -> Vec<ShardId> {
        self.inner.table().whole.iter().copied().collect()
    }

    pub fn is_whole(&self, shard: ShardId) -> bool {
        self.inner.table().whole.contains(&shard)
    }

    pub fn is_pinned(&self, shard: ShardId) -> bool {
        self.inner.table().pinned.contains(&shard)
    }

    /// What is held of an object, if anything is.
    pub async fn groups(&self, shard: ShardId) -> Option<Groups> {
        let object = self.inner.object(shard)?;
        self.blocking(move |_| read_lock(&object.held).groups.clone()).await.ok()
    }

    /// Changes whenever [`Self::complete`] does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    pub fn stats(&self) -> DiskStats {
        let table = self.inner.table();
        DiskStats {
            whole_objects: table.whole.len() as u64,
            part_objects: (table.objects.len() - table.whole.len().min(table.objects.len())) as u64,
            used_bytes: table.used,
            pinned_bytes: table.pinned_bytes(),
            budget_bytes: self.inner.budget,
            evictions: table.evictions,
            quarantines: table.quarantines,
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|e| StoreError::io("a file operation was stopped", io::Error::other(e)))
    }
}

impl Table {
    fn new(policy: Box<dyn Policy<ShardId>>) -> Self {
        Self {
            objects: HashMap::new(),
            whole: BTreeSet::new(),
            pinned: HashSet::new(),
            evicting: HashSet::new(),
            policy,
            used: 0,
            used_lately: HashMap::new(),
            evictions: 0,
            quarantines: 0,
        }
    }

    fn pinned_bytes(&self) -> u64 {
        self.pinned.iter().filter_map(|shard| self.policy.cost(shard)).sum()
    }

    /// Sets what an object counts against the budget.
    fn charge(&mut self, shard: ShardId, bytes: u64) {
        let before = self.policy.cost(&shard).unwrap_or(0);
        self.used = self.used.saturating_sub(before) + bytes;
        self.policy.insert(shard, bytes);
    }

    fn forget(&mut self, shard: ShardId) -> bool {
        self.objects.remove(&shard);
        self.pinned.remove(&shard);
        self.used_lately.remove(&shard);
        self.used = self.used.saturating_sub(self.policy.remove(&shard).unwrap_or(0));
        self.whole.remove(&shard)
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
        let new = || Arc::new(Object { held: RwLock::new(Held::empty(size)) });
        Arc::clone(table.objects.entry(shard).or_insert_with(new))
    }

    fn announce(&self) {
        self.changes.send_modify(|version| *version += 1);
    }

    /// Fills the table from what the files say; the index adds the order of use.
    fn load(&self, records: HashMap<ShardId, Record>) -> Result<(), StoreError> {
        let mut found: HashMap<ShardId, Names> = HashMap::new();
        self.layout.scan(|shard, kind, entry| {
            let names = found.entry(shard).or_default();
            let len = || entry.metadata().map_or(0, |meta| meta.len());
            match kind {
                FileKind::Whole => names.whole = Some(len()),
                FileKind::Part => names.part = true,
                FileKind::Have => names.have = true,
                FileKind::Outboard => names.outboard = Some(len()),
                FileKind::Pin => names.pin = true,
            }
        })?;
        let mut order: Vec<_> = found
            .into_iter()
            .map(|(shard, names)| (records.get(&shard).map_or(0, |r| r.last_use), shard, names))
            .collect();
        order.sort_unstable_by_key(|(last_use, shard, _)| (*last_use, *shard));
        let mut fresh = Vec::new();
        for (last_use, shard, names) in order {
            let Some(held) = self.adopt(shard, &names, records.get(&shard))? else {
                if names.whole.is_some() {
                    tracing::warn!(%shard, "nothing in its file proves itself; removed");
                }
                object::erase(&self.layout, shard)
                    .map_err(StoreError::file(&self.layout.dir(shard)))?;
                continue;
            };
            let record = Record {
                size: held.groups.size(),
                held: held.groups.held_bytes(),
                last_use,
                pinned: names.pin,
            };
            if records.get(&shard) != Some(&record) {
                fresh.push((shard, record));
            }
            let mut table = self.table();
            table.charge(shard, held.charge());
            if held.whole {
                table.whole.insert(shard);
            }
            if names.pin {
                table.pinned.insert(shard);
            }
            table.objects.insert(shard, Arc::new(Object { held: RwLock::new(held) }));
        }
        for shard in records.keys().filter(|shard| !self.knows(**shard)) {
            self.index.remove(*shard);
        }
        self.index.put_all(fresh);
        // A budget smaller than last time: let go of what was used least.
        self.make_room(0, None)
    }

    /// What an object's files amount to; `None` if they hold nothing.
    fn adopt(
        &self,
        shard: ShardId,
        names: &Names,
        record: Option<&Record>,
    ) -> Result<Option<Held>, StoreError> {
        if let Some(len) = names.whole {
            for kind in [FileKind::Part, FileKind::Have] {
                let _ = files::remove(&self.layout.path(shard, kind));
            }
            let fits = |size: u64| names.outboard.unwrap_or(0) == outboard_bytes(size);
            if len <= OBJECT_BYTES_MAX && fits(len) {
                return Ok(Some(Held::whole(len)));
            }
            // Cut short, grown, or its outboard lost: keep what still proves itself.
            let size = record.map(|r| r.size).filter(|size| fits(*size)).unwrap_or(len);
            if size > OBJECT_BYTES_MAX {
                return Ok(None);
            }
            let mut held = Held::whole(size);
            if let Health::Damaged(sound) = object::examine(&self.layout, shard, &held)? {
                tracing::warn!(%shard, "damaged since the last run; its sound groups are kept");
                object::demote(&self.layout, shard, &mut held, sound)?;
            }
            return Ok((held.charge() > 0).then_some(held));
        }
        if !(names.part && names.have) {
            return Ok(None);
        }
        let path = self.layout.path(shard, FileKind::Have);
        let have = fs::read(&path).map_err(StoreError::file(&path))?;
        let Some(groups) = Groups::from_file(shard, &have) else { return Ok(None) };
        Ok((groups.held_bytes() > 0).then_some(Held { groups, ..Held::empty(0) }))
    }

    fn read(&self, shard: ShardId, range: ByteRange) -> Result<Option<VerifiedRange>, ReadError> {
        // Twice: damage may turn out to be the outboard's, which is then made anew.
        for _ in 0..2 {
            let Some(object) = self.object(shard) else { return Ok(None) };
            let fault = {
                let held = read_lock(&object.held);
                let size = held.groups.size();
                if held.dead || !held.groups.holds(range) {
                    if range.end() > size && held.groups.proves_size() && !held.dead {
                        return Err(ReadError::OutOfRange { shard, range, size });
                    }
                    return Ok(None);
                }
                let cached = held.whole.then(|| self.cached_outboard(shard)).flatten();
                match object::read(&self.layout, shard, &held, range, cached) {
                    Ok((verified, outboard)) => {
                        if held.whole {
                            self.cache_outboard(outboard);
                        }
                        drop(held);
                        self.note_use(shard);
                        return Ok(Some(verified));
                    }
                    Err(fault) => fault,
                }
            };
            match fault {
                ReadFault::Io(e) => return Err(e.into()),
                ReadFault::Vanished => {
                    tracing::warn!(%shard, "its files were removed by someone else");
                    self.drop_object(shard, &object, DropWhy::Gone)?;
                    return Ok(None);
                }
                ReadFault::Damaged(error) => {
                    tracing::warn!(%shard, %range, %error, "damaged on disk");
                    if !self.quarantine(shard, &object, range)? {
                        let detail = format!("on disk in {}: {error}", self.root.display());
                        return Err(ReadError::Corrupt { shard, detail });
                    }
                }
            }
        }
        let detail = format!("on disk in {}, again after mending", self.root.display());
        Err(ReadError::Corrupt { shard, detail })
    }

    /// Takes damaged groups out of what is held. True if `range` is sound after all.
    fn quarantine(
        &self,
        shard: ShardId,
        object: &Object,
        range: ByteRange,
    ) -> Result<bool, StoreError> {
        let mut held = write_lock(&object.held);
        if held.dead || !held.groups.holds(range) {
            return Ok(false);
        }
        self.forget_outboard(shard);
        let health = object::examine(&self.layout, shard, &held)?;
        let Health::Damaged(sound) = health else { return Ok(true) };
        self.table().quarantines += 1;
        object::demote(&self.layout, shard, &mut held, sound)?;
        let mut table = self.table();
        table.charge(shard, held.charge());
        let was_whole = table.whole.remove(&shard);
        drop(table);
        if was_whole {
            self.announce();
        }
        Ok(held.groups.holds(range))
    }

    fn keep(&self, range: &VerifiedRange) -> Result<Kept, StoreError> {
        let (shard, size) = (range.shard(), range.size());
        let promised = range.range().len() + outboard_bytes(size);
        self.make_room(promised, Some(shard))?;
        let kept = self.keep_promised(range);
        let mut table = self.table();
        table.used = table.used.saturating_sub(promised);
        drop(table);
        if matches!(kept, Ok(Kept::Whole)) {
            self.announce();
        }
        kept
    }

    fn keep_promised(&self, range: &VerifiedRange) -> Result<Kept, StoreError> {
        let (shard, size) = (range.shard(), range.size());
        for _ in 0..RETRIES_MAX {
            let object = self.object_or_new(shard, size);
            let mut held = write_lock(&object.held);
            if held.dead {
                continue;
            }
            if held.whole || (held.groups.size() == size && held.groups.holds(range.range())) {
                return Ok(Kept::Already);
            }
            if held.groups.size() != size {
                if held.groups.proves_size() && held.groups.held_bytes() > 0
                    || !range.proves_size() && held.groups.held_bytes() > 0
                {
                    return Ok(Kept::SizeConflict);
                }
                // What is held claimed a size that is now disproved.
                object::erase(&self.layout, shard)
                    .map_err(StoreError::file(&self.layout.dir(shard)))?;
                *held = Held::empty(size);
                self.table().pinned.remove(&shard);
            }
            let written = object::write(&self.layout, &mut held, range);
            if written.is_err() && held.groups.held_bytes() == 0 {
                held.dead = true;
                let _ = object::erase(&self.layout, shard);
                self.table().forget(shard);
            }
            written?;
            let mut table = self.table();
            table.charge(shard, held.charge());
            let whole = held.whole;
            if whole {
                table.whole.insert(shard);
            }
            drop(table);
            drop(held);
            self.note_use(shard);
            return Ok(if whole { Kept::Whole } else { Kept::Part });
        }
        Ok(Kept::Already)
    }

    fn put(&self, bytes: &Bytes, pin: bool) -> Result<ShardId, StoreError> {
        let size = bytes.len() as u64;
        if size > OBJECT_BYTES_MAX {
            return Err(StoreError::TooLarge { what: "an object".to_owned(), size });
        }
        let outboard = Outboard::of(bytes)
            .map_err(|e| StoreError::io("hashing an object", io::Error::other(e)))?;
        let temp = self.layout.temp();
        self.store_whole(&outboard, pin, &temp, || {
            File::create(&temp)
                .and_then(|mut file| file.write_all(bytes))
                .map_err(StoreError::file(&temp))
        })?;
        Ok(outboard.shard())
    }

    fn import(&self, path: &Path, expected: ShardId, pin: bool) -> Result<u64, StoreError> {
        let source = fs::canonicalize(path).map_err(StoreError::file(path))?;
        let length = |file: &Path| {
            let size = fs::metadata(file).map_err(StoreError::file(path))?.len();
            if size > OBJECT_BYTES_MAX {
                return Err(StoreError::TooLarge { what: path.display().to_string(), size });
            }
            Ok(size)
        };
        length(&source)?;
        let temp = self.layout.temp();
        let checked = (|| {
            // First the name or the copy, then the hash of that: what is hashed is what is kept.
            if fs::hard_link(&source, &temp).is_err() {
                fs::copy(&source, &temp).map_err(StoreError::file(path))?;
            }
            let size = length(&temp)?;
            let file = File::open(&temp).map_err(StoreError::file(path))?;
            let outboard = Outboard::of_reader(file, size).map_err(StoreError::file(path))?;
            if outboard.shard() != expected {
                let actual = outboard.shard();
                return Err(StoreError::Mismatch { path: path.to_owned(), expected, actual });
            }
            self.store_whole(&outboard, pin, &temp, || Ok(())).map(|()| size)
        })();
        if checked.is_err() {
            let _ = fs::remove_file(&temp);
        }
        checked
    }

    /// Puts an object in place whose bytes `fill` writes to `temp`, pinned or not.
    fn store_whole(
        &self,
        outboard: &Outboard,
        pin: bool,
        temp: &Path,
        fill: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let (shard, size) = (outboard.shard(), outboard.size());
        if self.table().whole.contains(&shard) && self.is_sound(shard) {
            let _ = fs::remove_file(temp);
            return if pin { self.pin(shard) } else { Ok(()) };
        }
        let promised = size + outboard_bytes(size);
        self.make_room(promised, Some(shard))?;
        let placed = fill().and_then(|()| self.place_promised(outboard, pin, temp));
        let mut table = self.table();
        table.used = table.used.saturating_sub(promised);
        drop(table);
        if placed.is_err() {
            let _ = fs::remove_file(temp);
        }
        placed?;
        self.announce();
        Ok(())
    }

    fn place_promised(
        &self,
        outboard: &Outboard,
        pin: bool,
        temp: &Path,
    ) -> Result<(), StoreError> {
        let shard = outboard.shard();
        for _ in 0..RETRIES_MAX {
            let object = self.object_or_new(shard, outboard.size());
            let mut held = write_lock(&object.held);
            if held.dead {
                continue;
            }
            let pin_path = self.layout.path(shard, FileKind::Pin);
            if pin {
                self.layout.write_atomic(&pin_path, b"")?;
            }
            if let Err(e) = object::place(&self.layout, outboard, temp, &mut held) {
                if held.groups.held_bytes() == 0 {
                    held.dead = true;
                    let _ = object::erase(&self.layout, shard);
                    self.table().forget(shard);
                }
                return Err(e);
            }
            self.forget_outboard(shard);
            let mut table = self.table();
            table.charge(shard, held.charge());
            table.whole.insert(shard);
            if pin {
                table.pinned.insert(shard);
            }
            drop(table);
            drop(held);
            self.note_use(shard);
            return Ok(());
        }
        Err(StoreError::NotHeld(shard))
    }

    /// Whether an object said to be whole still proves itself; damage is taken out.
    fn is_sound(&self, shard: ShardId) -> bool {
        let Some(object) = self.object(shard) else { return false };
        let size = read_lock(&object.held).groups.size();
        let Some(whole) = ByteRange::new(0, size) else { return true };
        matches!(self.read(shard, whole), Ok(Some(_)))
    }

    fn pin(&self, shard: ShardId) -> Result<(), StoreError> {
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        let held = write_lock(&object.held);
        if held.dead {
            return Err(StoreError::NotHeld(shard));
        }
        let path = self.layout.path(shard, FileKind::Pin);
        self.layout.write_atomic(&path, b"")?;
        let dir = self.layout.dir(shard);
        files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
        self.table().pinned.insert(shard);
        Ok(())
    }

    fn unpin(&self, shard: ShardId) -> Result<(), StoreError> {
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        let _held = write_lock(&object.held);
        let path = self.layout.path(shard, FileKind::Pin);
        files::remove(&path).map_err(StoreError::file(&path))?;
        self.table().pinned.remove(&shard);
        Ok(())
    }

    fn remove(&self, shard: ShardId) -> Result<(), StoreError> {
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        self.drop_object(shard, &object, DropWhy::Asked)
    }

    fn drop_object(&self, shard: ShardId, object: &Object, why: DropWhy) -> Result<(), StoreError> {
        let mut held = write_lock(&object.held);
        if held.dead {
            return Ok(());
        }
        if why == DropWhy::Room {
            // A pin takes the object's lock too, so it came before or comes too late.
            let mut table = self.table();
            if table.pinned.contains(&shard) {
                return Ok(());
            }
            table.evictions += 1;
        }
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

    /// Promises `room` bytes of the budget (they count as used from here),
    /// evicting what was used least; never `keep`, never what is pinned.
    fn make_room(&self, room: u64, keep: Option<ShardId>) -> Result<(), StoreError> {
        for _ in 0..RETRIES_MAX {
            let victims = {
                let mut table = self.table();
                let over = table.used.saturating_add(room).saturating_sub(self.budget);
                if over == 0 {
                    table.used += room;
                    return Ok(());
                }
                let spared = |shard: &ShardId| {
                    Some(*shard) == keep
                        || table.pinned.contains(shard)
                        || table.evicting.contains(shard)
                };
                let Some(victims) = table.policy.victims(over, &spared) else {
                    let available = self.budget.saturating_sub(table.pinned_bytes());
                    let budget = self.budget;
                    // Opening with a smaller budget: nothing is asked for, too much is pinned.
                    let needed = if room == 0 { table.pinned_bytes() } else { room };
                    let available = if room == 0 { budget } else { available };
                    return Err(StoreError::Budget { needed, available, budget });
                };
                table.evicting.extend(victims.iter().copied());
                victims
            };
            for shard in &victims {
                let evicted = match self.object(*shard) {
                    Some(object) => self.drop_object(*shard, &object, DropWhy::Room),
                    None => Ok(()),
                };
                self.table().evicting.remove(shard);
                evicted?;
            }
        }
        let available = self.budget.saturating_sub(self.table().used);
        Err(StoreError::Budget { needed: room, available, budget: self.budget })
    }

    fn note_use(&self, shard: ShardId) {
        let number = self.uses.fetch_add(1, Ordering::Relaxed) + 1;
        let mut table = self.table();
        table.policy.touch(&shard);
        table.used_lately.insert(shard, number);
        if table.used_lately.len() < USES_BATCH {
            return;
        }
        drop(table);
        self.write_uses();
    }

    fn write_uses(&self) {
        let mut table = self.table();
        let lately = std::mem::take(&mut table.used_lately);
        let pinned: HashSet<_> =
            lately.keys().filter(|shard| table.pinned.contains(shard)).copied().collect();
        drop(table);
        let record = |(shard, last_use): (ShardId, u64)| {
            let object = self.object(shard)?;
            // Not waited for: the record is a copy, and its object may be locked by this thread.
            let held = object.held.try_read().ok()?;
            let (size, held) = (held.groups.size(), held.groups.held_bytes());
            Some((shard, Record { size, held, last_use, pinned: pinned.contains(&shard) }))
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
        Ok(())
    }

    fn cached_outboard(&self, shard: ShardId) -> Option<Outboard> {
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        cache.order.touch(&shard);
        cache.nodes.get(&shard).cloned()
    }

    fn cache_outboard(&self, outboard: Outboard) {
        let (shard, cost) = (outboard.shard(), outboard.nodes().len() as u64);
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.nodes.contains_key(&shard) {
            return;
        }
        let over = (cache.order.total() + cost).saturating_sub(OUTBOARD_CACHE_BYTES);
        for victim in cache.order.victims(over, &|_| false).unwrap_or_default() {
            cache.order.remove(&victim);
            cache.nodes.remove(&victim);
        }
        // Small objects have empty outboards; each still costs its entry.
        cache.order.insert(shard, cost.max(64));
        cache.nodes.insert(shard, outboard);
    }

    fn forget_outboard(&self, shard: ShardId) {
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        cache.order.remove(&shard);
        cache.nodes.remove(&shard);
    }
}

/// Why an object is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DropWhy {
    /// Room is needed; not if it is pinned by now.
    Room,
    /// Someone asked for it.
    Asked,
    /// Its files are gone already.
    Gone,
}

/// The files found of one object; lengths in bytes.
#[derive(Debug, Default)]
struct Names {
    whole: Option<u64>,
    part: bool,
    have: bool,
    outboard: Option<u64>,
    pin: bool,
}

fn read_lock(held: &RwLock<Held>) -> std::sync::RwLockReadGuard<'_, Held> {
    held.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock(held: &RwLock<Held>) -> std::sync::RwLockWriteGuard<'_, Held> {
    held.write().unwrap_or_else(PoisonError::into_inner)
}
