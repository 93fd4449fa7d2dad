//! The layout of a data directory, and the file operations of the disk tier.
//! Everything here blocks: call it from blocking threads only.
//!
//! ```text
//! DIR/lock                      held while a node runs here; contains its process id
//! DIR/index/                    the sled index, a cache of what follows
//! DIR/tmp/                      files being written; emptied at start
//! DIR/reserve                   space released when the disk is full (see `reserve`)
//! DIR/objects/ab/abcd..         a whole object, named by its BLAKE3 hash
//! DIR/objects/ab/abcd...part    an object of which some groups are held
//! DIR/objects/ab/abcd...have    which groups (see `groups`); written after they are synced
//! DIR/objects/ab/abcd...obao    the object's outboard; absent if it would be empty
//! DIR/objects/ab/abcd...pin     present if the object must not be evicted
//! ```
//!
//! Invariant: a file without an extension is a whole object. It gets that name
//! by a rename, after its bytes and its outboard are synced.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::ShardId;
use super::error::StoreError;

/// The most bytes of the lock file that are read to find a process id.
const LOCK_BYTES_MAX: u64 = 32;

/// Bytes written to find out whether the disk is full.
const PROBE_BYTES: usize = 64 * 1024;

/// The path of a whole object in a data directory. The file may be read by anyone who verifies the
/// bytes, and the store may evict it at any time.
pub fn object_path(root: &Path, shard: ShardId) -> PathBuf {
    root.join("objects").join(format!("{:02x}", shard.as_bytes()[0])).join(shard.to_string())
}

/// Paths within one data directory.
#[derive(Debug)]
pub(super) struct Layout {
    root: PathBuf,
    temps: AtomicU64,
}

/// What a file in `objects/` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Whole,
    Part,
    Have,
    Outboard,
    Pin,
}

impl Layout {
    /// Creates the missing directories and empties `tmp`. If none is missing,
    /// this only deletes files, so it works on a full disk.
    pub fn create(root: &Path) -> Result<Self, StoreError> {
        let layout = Self { root: root.to_owned(), temps: AtomicU64::new(0) };
        let tmp = layout.tmp_dir();
        fs::create_dir_all(&tmp).map_err(StoreError::file(&tmp))?;
        for entry in fs::read_dir(&tmp).map_err(StoreError::file(&tmp))? {
            let path = entry.map_err(StoreError::file(&tmp))?.path();
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(StoreError::file(&path))?;
        }
        let objects = layout.objects_dir();
        let mut made = false;
        for first in 0..=u8::MAX {
            let dir = objects.join(format!("{first:02x}"));
            if !dir.is_dir() {
                fs::create_dir_all(&dir).map_err(StoreError::file(&dir))?;
                made = true;
            }
        }
        if made {
            sync_dir(&objects).map_err(StoreError::file(&objects))?;
            sync_dir(root).map_err(StoreError::file(root))?;
        }
        Ok(layout)
    }

    /// Checks that the disk is writable: writes [`PROBE_BYTES`] and deletes them.
    pub fn probe(&self) -> Result<(), StoreError> {
        let temp = self.temp();
        let written = File::create(&temp).and_then(|mut file| {
            file.write_all(&[0x5A; PROBE_BYTES])?;
            file.sync_all()
        });
        let _ = fs::remove_file(&temp);
        written.map_err(StoreError::file(&self.root))
    }

    pub fn index_dir(&self) -> PathBuf {
        self.root.join("index")
    }

    fn tmp_dir(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn objects_dir(&self) -> PathBuf {
        self.root.join("objects")
    }

    /// A name for a new temporary file on the same file system.
    pub fn temp(&self) -> PathBuf {
        let n = self.temps.fetch_add(1, Ordering::Relaxed);
        self.tmp_dir().join(n.to_string())
    }

    /// The directory that an object's files are in.
    pub fn dir(&self, shard: ShardId) -> PathBuf {
        self.objects_dir().join(format!("{:02x}", shard.as_bytes()[0]))
    }

    pub fn path(&self, shard: ShardId, kind: FileKind) -> PathBuf {
        let suffix = match kind {
            FileKind::Whole => "",
            FileKind::Part => ".part",
            FileKind::Have => ".have",
            FileKind::Outboard => ".obao",
            FileKind::Pin => ".pin",
        };
        self.dir(shard).join(format!("{shard}{suffix}"))
    }

    /// Calls `found` for every object file, with the id and kind that its name says.
    /// Skips other names.
    pub fn scan(
        &self,
        mut found: impl FnMut(ShardId, FileKind, fs::DirEntry),
    ) -> Result<(), StoreError> {
        for first in 0..=u8::MAX {
            let dir = self.objects_dir().join(format!("{first:02x}"));
            for entry in fs::read_dir(&dir).map_err(StoreError::file(&dir))? {
                let entry = entry.map_err(StoreError::file(&dir))?;
                let name = entry.file_name();
                let Some(name) = name.to_str() else { continue };
                let (id, kind) = match name.split_once('.') {
                    None => (name, FileKind::Whole),
                    Some((id, "part")) => (id, FileKind::Part),
                    Some((id, "have")) => (id, FileKind::Have),
                    Some((id, "obao")) => (id, FileKind::Outboard),
                    Some((id, "pin")) => (id, FileKind::Pin),
                    Some(_) => continue,
                };
                if let Ok(shard) = id.parse::<ShardId>()
                    && shard.as_bytes()[0] == first
                {
                    found(shard, kind, entry);
                }
            }
        }
        Ok(())
    }

    /// Replaces the contents of `to` with `bytes`, atomically: temporary file,
    /// sync, rename. The caller syncs the directory.
    pub fn write_atomic(&self, to: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let temp = self.temp();
        let written = (|| {
            let mut file = File::create(&temp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temp, to)
        })();
        written.map_err(|e| {
            let _ = fs::remove_file(&temp);
            StoreError::io(to.display().to_string(), e)
        })
    }
}

/// Locks the data directory for this process, until the file is dropped.
pub(super) fn lock(root: &Path) -> Result<File, StoreError> {
    fs::create_dir_all(root).map_err(StoreError::file(root))?;
    let path = root.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(StoreError::file(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let _ = file.take(LOCK_BYTES_MAX).read_to_string(&mut text);
            let holder = text.trim().parse().ok();
            return Err(StoreError::Locked { dir: root.to_owned(), holder });
        }
        Err(TryLockError::Error(e)) => return Err(StoreError::io(path.display().to_string(), e)),
    }
    // The process id is only for other processes' messages, so a failed write is harmless.
    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(file)
}

/// Makes new and renamed files in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes a file. A missing file is not an error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Opens a file for reading and writing at offsets, and makes it `size` bytes long.
pub(super) fn open_sized(path: &Path, size: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if file.metadata()?.len() != size {
        file.set_len(size)?;
    }
    Ok(file)
}

#[cfg(unix)]
pub(super) fn read_at(file: &File, buf: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, at)
}

#[cfg(unix)]
pub(super) fn write_at(file: &File, buf: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, buf, at)
}

/// Other systems have no positioned read. Callers open a file for each
/// operation, so no two threads share one file position.
#[cfg(not(unix))]
pub(super) fn read_at(file: &File, buf: &mut [u8], at: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(buf)
}

#[cfg(not(unix))]
pub(super) fn write_at(file: &File, buf: &[u8], at: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(at))?;
    file.write_all(buf)
}

/// Whether this file must not be written in place: another name shares its
/// bytes (a hard link made by an import), or it is read-only.
pub(super) fn is_foreign(path: &Path) -> io::Result<bool> {
    let meta = fs::metadata(path)?;
    #[cfg(unix)]
    let shared = std::os::unix::fs::MetadataExt::nlink(&meta) > 1;
    #[cfg(not(unix))]
    let shared = true;
    Ok(shared || meta.permissions().readonly())
}

/// How a file was imported into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImportMethod {
    /// Shares the source's blocks until either file is written to (a reflink).
    Cloned,
    /// Another name of the source's own file.
    Linked,
    Copied,
}

/// Clones, links or copies `source` to the new name `to`.
///
/// A clone comes first, because later changes to the source cannot reach it. A
/// hard link is as cheap, but its owner may rewrite the file in place; reads
/// detect that, because they verify every byte. A copy is the last resort.
pub(super) fn import(source: &Path, to: &Path) -> io::Result<ImportMethod> {
    if clone(source, to).is_ok() {
        return Ok(ImportMethod::Cloned);
    }
    let _ = remove(to);
    if fs::hard_link(source, to).is_ok() {
        return Ok(ImportMethod::Linked);
    }
    copy(source, to)?;
    Ok(ImportMethod::Copied)
}

#[cfg(target_os = "linux")]
fn clone(source: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (File::open(source)?, File::create_new(to)?);
    rustix::fs::ioctl_ficlone(to, from)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn clone(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Copies bytes but not the mode, so that a copy of a read-only file can be repaired.
pub(super) fn copy(source: &Path, to: &Path) -> io::Result<u64> {
    io::copy(&mut File::open(source)?, &mut File::create(to)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_directory_and_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Locked { holder: Some(pid), .. }
            if *pid == std::process::id()));
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
        drop(held);
        assert!(lock(dir.path()).is_ok());
    }

    #[test]
    fn scan_finds_objects_by_name_and_skips_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let shard = ShardId::of(b"x");
        let kinds = [FileKind::Whole, FileKind::Part, FileKind::Have, FileKind::Outboard];
        for kind in kinds {
            layout.write_atomic(&layout.path(shard, kind), b"x").unwrap();
        }
        fs::write(layout.dir(shard).join("README"), "not ours").unwrap();
        fs::write(layout.dir(shard).join(format!("{shard}.bak")), "not ours").unwrap();
        let mut found = Vec::new();
        layout.scan(|id, kind, _| found.push((id, kind))).unwrap();
        assert_eq!(found.len(), kinds.len());
        assert!(kinds.iter().all(|kind| found.contains(&(shard, *kind))));
        let temp = layout.temp();
        fs::write(&temp, "left over").unwrap();
        Layout::create(dir.path()).unwrap();
        assert!(!temp.exists());
    }
}
