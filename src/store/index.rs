//! The sled index. It records what the files do not say (last use, hot) and
//! copies what they do say (size, bytes held, pin).
//!
//! It is only a cache. sled 0.34 calls itself beta, so nothing that matters
//! exists only here. An index that is missing, damaged or of another version is
//! discarded and rebuilt from the files; a failed write is logged and ignored.
//! Everything here blocks.

use std::collections::HashMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::{ShardId, regular};

/// Changes with the record format; an index of another version is discarded.
const VERSION: &[u8] = b"doppler-store-2";
/// Shorter than a hash, so it cannot clash with a record's key.
const VERSION_KEY: &[u8] = b"version";
const RECORD_BYTES: usize = 26;
const CACHE_BYTES: u64 = 8 * 1024 * 1024;

/// What the index records of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// The object's size in bytes.
    pub size: u64,
    /// How many of its bytes are held.
    pub held: u64,
    /// The number of its last use. Uses of all objects are counted together; not a time.
    pub last_use: u64,
    pub pinned: bool,
    /// Some part of it was read more than once.
    pub hot: bool,
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.held.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.last_use.to_le_bytes());
        bytes[24] = u8::from(self.pinned);
        bytes[25] = u8::from(self.hot);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes.len() != RECORD_BYTES {
            return None;
        }
        let (pinned, hot) = (bytes[24] == 1, bytes[25] == 1);
        Some(Self { size: word(0)?, held: word(8)?, last_use: word(16)?, pinned, hot })
    }
}

/// The open index. Without a database (it could not even be recreated) the store
/// works, but does not remember the order of use.
pub(super) struct Index {
    db: Option<sled::Db>,
}

impl Index {
    /// An index that records nothing, for a full disk.
    pub const fn none() -> Self {
        Self { db: None }
    }

    /// Opens the index and returns its records. Recreates it if it cannot be read.
    pub fn open(dir: &Path) -> (Self, HashMap<ShardId, Record>) {
        match try_open(dir) {
            Ok((db, records)) => return (Self { db: Some(db) }, records),
            Err(reason) if dir.exists() => {
                tracing::warn!(dir = %dir.display(), %reason, "rebuilding the index from the files");
            }
            Err(_) => {}
        }
        let fresh = fs::remove_dir_all(dir).map_err(|e| e.to_string()).and_then(|()| try_open(dir));
        match fresh {
            Ok((db, records)) => (Self { db: Some(db) }, records),
            Err(reason) => {
                tracing::warn!(dir = %dir.display(), %reason, "working without an index");
                (Self { db: None }, HashMap::new())
            }
        }
    }

    pub fn put_all(&self, records: impl IntoIterator<Item = (ShardId, Record)>) {
        let mut batch = sled::Batch::default();
        for (shard, record) in records {
            batch.insert(&shard.as_bytes()[..], &record.to_bytes()[..]);
        }
        self.with("write", |db| db.apply_batch(batch));
    }

    pub fn remove(&self, shard: ShardId) {
        self.with("remove", |db| db.remove(shard.as_bytes()).map(drop));
    }

    pub fn flush(&self) {
        self.with("flush", |db| db.flush().map(drop));
    }

    fn with(&self, what: &str, act: impl FnOnce(&sled::Db) -> sled::Result<()>) {
        let Some(db) = &self.db else { return };
        match catch_unwind(AssertUnwindSafe(|| act(db))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, what, "the index failed; it is only a cache"),
            Err(_) => tracing::warn!(what, "the index panicked; it is only a cache"),
        }
    }
}

/// sled opens its files itself, and would wait at a FIFO.
fn only_files(dir: &Path) -> Result<(), String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    for entry in entries {
        let entry = entry.map_err(|e| e.to_string())?;
        let of = entry.file_type().map_err(|e| e.to_string())?;
        if of.is_dir() {
            only_files(&entry.path())?;
        } else if !of.is_file() {
            return Err(format!("{} is {}", entry.path().display(), regular::describe(of)));
        }
    }
    Ok(())
}

/// sled may panic on damaged files, so panics are caught.
fn try_open(dir: &Path) -> Result<(sled::Db, HashMap<ShardId, Record>), String> {
    let opened = catch_unwind(|| {
        only_files(dir)?;
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(1_000))
            .open()
            .map_err(|e| e.to_string())?;
        match db.get(VERSION_KEY).map_err(|e| e.to_string())? {
            Some(version) if version == VERSION => {}
            None if db.is_empty() => {
                db.insert(VERSION_KEY, VERSION).map_err(|e| e.to_string())?;
            }
            _ => return Err("another version's index".to_owned()),
        }
        let mut records = HashMap::new();
        for item in db.iter() {
            let (key, value) = item.map_err(|e| e.to_string())?;
            if let Ok(id) = <[u8; 32]>::try_from(&key[..]) {
                let record = Record::from_bytes(&value).ok_or("a damaged record")?;
                records.insert(ShardId::from(id), record);
            }
        }
        Ok((db, records))
    });
    opened.unwrap_or_else(|_| Err("sled panicked".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u64) -> Record {
        Record { size: n + 1, held: n, last_use: 7 * n, pinned: n % 2 == 1, hot: n % 3 == 1 }
    }

    fn filled(dir: &Path) -> HashMap<ShardId, Record> {
        let records: HashMap<_, _> =
            (0..50_u64).map(|n| (ShardId::of(&n.to_le_bytes()), record(n))).collect();
        let (index, before) = Index::open(dir);
        assert!(before.is_empty());
        index.put_all(records.clone());
        index.flush();
        records
    }

    #[test]
    fn records_come_back_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let mut records = filled(&path);
        let gone = ShardId::of(&3_u64.to_le_bytes());
        {
            let (index, read) = Index::open(&path);
            assert_eq!(read, records);
            index.remove(gone);
            index.flush();
        }
        records.remove(&gone);
        assert_eq!(Index::open(&path).1, records);
    }

    #[test]
    fn a_damaged_index_is_recreated() {
        for keep in [0, 1, 100] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index");
            filled(&path);
            for file in ["db", "conf"] {
                let mut bytes = fs::read(path.join(file)).unwrap();
                let len = bytes.len().min(2000);
                bytes[keep.min(len)..len].fill(0xA5);
                fs::write(path.join(file), bytes).unwrap();
            }
            let (index, read) = Index::open(&path);
            assert!(read.is_empty(), "{} records from a damaged index", read.len());
            assert!(index.db.is_some());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        fs::write(&path, b"a file where the directory should be").unwrap();
        let (index, read) = Index::open(&path);
        assert!(read.is_empty());
        index.put_all([(ShardId::of(b"x"), record(1))]);
    }
}
