//! Keys and values of texts that were computed before, on disk: block by block, under the ids of
//! what they were computed from. They outlive the model in memory and the process.
//!
//! Blocks come here when a kept sequence is dropped, when its model is unloaded, and when the node
//! stops; a thread writes them. Every file begins with the BLAKE3 hash of the rest: one that is torn
//! or changed is deleted and counts as missing. Bounded by bytes on disk, the blocks not used for
//! longest go first; and by bytes that wait to be written, beyond which blocks are dropped. The
//! directory is its user's alone, because its files say what was asked.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use data_encoding::HEXLOWER;
use doppler_infer::engine::BlockId;
use lru::LruCache;

/// Bytes that may wait to be written.
const WAITING_MAX: u64 = 256 << 20;
/// Bytes of the hash that a file begins with.
const HASH: usize = 32;

/// Blocks on disk.
pub struct Prefixes {
    shared: Arc<Shared>,
    /// `None` once it is closed.
    queue: Option<Sender<(BlockId, Vec<u8>)>>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    dir: PathBuf,
    budget: u64,
    state: Mutex<State>,
    written: Condvar,
}

struct State {
    /// Bytes of the files, by id; the ones used last are at the front.
    files: LruCache<BlockId, u64>,
    bytes: u64,
    /// Bytes that wait to be written.
    waiting: u64,
}

/// What is on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub blocks: usize,
    pub bytes: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &BlockId) -> PathBuf {
        self.dir.join(HEXLOWER.encode(id.as_bytes()))
    }

    /// Writes a file whole or not at all, and makes room for it.
    fn write(&self, id: BlockId, bytes: &[u8]) -> io::Result<()> {
        let size = (HASH + bytes.len()) as u64;
        if size > self.budget {
            return Ok(());
        }
        for gone in self.state().make_room(self.budget - size) {
            fs::remove_file(self.path(&gone))?;
        }
        let part = self.dir.join("part");
        let mut file = fs::File::create(&part)?;
        file.write_all(blake3::hash(bytes).as_bytes())?;
        file.write_all(bytes)?;
        drop(file);
        fs::rename(&part, self.path(&id))?;
        self.state().add(id, size);
        Ok(())
    }

    fn work(&self, queue: &Receiver<(BlockId, Vec<u8>)>) {
        let mut failed = false;
        for (id, bytes) in queue {
            if let Err(error) = self.write(id, &bytes)
                && !std::mem::replace(&mut failed, true)
            {
                tracing::warn!("{}: prefixes are not kept: {error}", self.dir.display());
            }
            self.state().waiting -= bytes.len() as u64;
            self.written.notify_all();
        }
    }
}

impl State {
    fn add(&mut self, id: BlockId, size: u64) {
        self.bytes += size;
        if let Some(before) = self.files.put(id, size) {
            self.bytes -= before;
        }
    }

    fn remove(&mut self, id: &BlockId) {
        if let Some(size) = self.files.pop(id) {
            self.bytes -= size;
        }
    }

    /// Forgets the blocks not used for longest, until all take at most so many bytes.
    fn make_room(&mut self, most: u64) -> Vec<BlockId> {
        let mut gone = Vec::new();
        while self.bytes > most {
            let Some((id, size)) = self.files.pop_lru() else { break };
            self.bytes -= size;
            gone.push(id);
        }
        gone
    }
}

/// The files of a directory and their sizes, the ones not used for longest first. Deletes what is not
/// a block.
fn list(dir: &Path) -> io::Result<Vec<(BlockId, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = HEXLOWER.decode(entry.file_name().as_encoded_bytes());
        let Some(id) = name.ok().and_then(|name| name.try_into().ok()) else {
            fs::remove_file(entry.path())?;
            continue;
        };
        let meta = entry.metadata()?;
        found.push((meta.modified()?, BlockId::from_bytes(id), meta.len()));
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, id, size)| (id, size)).collect())
}

impl Prefixes {
    /// Opens the directory, and makes it if it is missing. Deletes what goes beyond the budget.
    ///
    /// # Errors
    /// If the directory cannot be read or made.
    pub fn open(dir: PathBuf, budget: u64) -> io::Result<Self> {
        make_private(&dir)?;
        let mut state = State { files: LruCache::unbounded(), bytes: 0, waiting: 0 };
        list(&dir)?.into_iter().for_each(|(id, size)| state.add(id, size));
        let gone = state.make_room(budget);
        let state = Mutex::new(state);
        let shared = Arc::new(Shared { dir, budget, state, written: Condvar::new() });
        for id in gone {
            fs::remove_file(shared.path(&id))?;
        }
        let (queue, blocks) = channel();
        let works = shared.clone();
        let writer = std::thread::Builder::new()
            .name("prefixes".to_owned())
            .spawn(move || works.work(&blocks))?;
        Ok(Self { shared, queue: Some(queue), writer: Some(writer) })
    }

    pub fn held(&self) -> Held {
        let state = self.shared.state();
        Held { blocks: state.files.len(), bytes: state.bytes }
    }

    /// Whether the block is on disk. If it is, it counts as used.
    pub fn has(&self, id: &BlockId) -> bool {
        self.shared.state().files.get(id).is_some()
    }

    /// Keeps a block, unless too much waits to be written. With `wait`, waits for that instead.
    pub fn put(&self, id: BlockId, bytes: Vec<u8>, wait: bool) {
        let mut state = self.shared.state();
        let size = bytes.len() as u64;
        while state.waiting > 0 && state.waiting + size > WAITING_MAX {
            if !wait {
                return;
            }
            state = self.shared.written.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting += size;
        drop(state);
        if let Some(queue) = &self.queue {
            // The thread ends only after the queue.
            let _ = queue.send((id, bytes));
        }
    }

    /// The bytes of a block, if it is on disk and whole.
    pub fn get(&self, id: &BlockId) -> Option<Vec<u8>> {
        if !self.has(id) {
            return None;
        }
        let path = self.shared.path(id);
        let read = fs::read(&path).ok().and_then(|mut file| {
            let (hash, bytes) = file.split_first_chunk::<HASH>()?;
            let is_whole = blake3::hash(bytes) == blake3::Hash::from_bytes(*hash);
            is_whole.then(|| file.split_off(HASH))
        });
        if read.is_none() {
            tracing::warn!("{}: not what was written; it is computed again", path.display());
            self.shared.state().remove(id);
            let _ = fs::remove_file(&path);
        } else if let Ok(file) = fs::File::options().write(true).open(&path) {
            // The order of use outlives the process.
            let _ = file.set_modified(std::time::SystemTime::now());
        }
        read
    }
}

impl Drop for Prefixes {
    /// Waits until all is written.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Makes a directory that only its user can read.
fn make_private(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> BlockId {
        BlockId::from_bytes([number; 32])
    }

    #[test]
    fn blocks_outlive_the_process_and_the_ones_not_used_for_longest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("prefixes");
        let size = (HASH + 100) as u64;
        let open = || Prefixes::open(dir.clone(), 3 * size + 5).unwrap();
        let prefixes = open();
        (0..3).for_each(|number| prefixes.put(id(number), vec![number; 100], true));
        drop(prefixes);
        let prefixes = open();
        assert_eq!(prefixes.held(), Held { blocks: 3, bytes: 3 * size });
        assert_eq!(prefixes.get(&id(0)), Some(vec![0; 100]));
        assert_eq!(prefixes.get(&id(9)), None);
        prefixes.put(id(3), vec![3; 100], true);
        // One that is too big by itself takes nobody's place.
        prefixes.put(id(4), vec![4; 1000], true);
        drop(prefixes);
        let prefixes = open();
        let there: Vec<u8> = (0..5).filter(|number| prefixes.has(&id(*number))).collect();
        assert_eq!(there, [0, 2, 3], "1 was not used for longest");
        drop(prefixes);
        // With a smaller budget less stays.
        let prefixes = Prefixes::open(dir.clone(), size).unwrap();
        assert_eq!(prefixes.held(), Held { blocks: 1, bytes: size });
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_was_changed_or_torn_counts_as_missing_and_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Prefixes::open(dir.path().to_owned(), 1 << 20).unwrap();
        let prefixes = open();
        (0..4).for_each(|number| prefixes.put(id(number), vec![number; 100], true));
        drop(prefixes);
        let path = |number| dir.path().join(HEXLOWER.encode(id(number).as_bytes()));
        let mut bytes = fs::read(path(0)).unwrap();
        bytes[HASH + 7] ^= 1;
        fs::write(path(0), &bytes).unwrap();
        fs::write(path(1), &bytes[..50]).unwrap();
        fs::write(path(2), b"").unwrap();
        fs::write(dir.path().join("part"), b"half of a block").unwrap();
        let prefixes = open();
        assert!((0..3).all(|number| prefixes.get(&id(number)).is_none()));
        assert_eq!(prefixes.get(&id(3)), Some(vec![3; 100]));
        assert_eq!(prefixes.held().blocks, 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_can_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("prefixes");
        drop(Prefixes::open(dir.clone(), 1 << 20).unwrap());
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o077, 0);
    }
}
