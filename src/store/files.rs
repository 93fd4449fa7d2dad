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
//! DIR/objects/ab/abcd...replica present if the object is here because the swarm had too few copies
//! DIR/objects/ab/abcd...pin     present if the object is pinned by itself; contains its size
//! DIR/pins/                     what each pinned model pins (see `pins`)
//! DIR/set-aside/                what lay here in the place of files and is none
//! ```
//!
//! Invariant: a file without an extension is a whole object. It gets that name
//! by a rename, after its bytes and its outboard are synced. Only regular files
//! are opened, so nothing here waits for another process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::StoreError;
use super::{ModelId, ShardId, regular};

/// The most bytes of the lock file that are read to find a process id.
const LOCK_BYTES_MAX: u64 = 32;

/// Bytes written to find out whether the disk is full.
const PROBE_BYTES: usize = 64 * 1024;

/// Things of one name that can be set aside.
const SET_ASIDE_MAX: usize = 1000;

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
    Replica,
}

impl Layout {
    /// Creates the missing directories and empties `tmp`. If none is missing,
    /// this only deletes files, so it works on a full disk.
    pub fn create(root: &Path) -> Result<Self, StoreError> {
        let layout = Self { root: root.to_owned(), temps: AtomicU64::new(0) };
        let tmp = layout.tmp_dir();
        layout.directory(&tmp)?;
        for entry in fs::read_dir(&tmp).map_err(StoreError::file(&tmp))? {
            let path = entry.map_err(StoreError::file(&tmp))?.path();
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            if let Err(error) = removed {
                // `temp` chooses other names.
                tracing::warn!(path = %path.display(), %error, "a temporary file is left");
            }
        }
        let objects = layout.objects_dir();
        let mut made = layout.directory(&layout.pins_dir())?;
        for first in 0..=u8::MAX {
            made |= layout.directory(&objects.join(format!("{first:02x}")))?;
        }
        if made {
            sync_dir(&objects).map_err(StoreError::file(&objects))?;
            sync_dir(root).map_err(StoreError::file(root))?;
        }
        Ok(layout)
    }

    /// Creates a directory if it is missing. Anything else of its name is set aside. True if it
    /// was created.
    fn directory(&self, dir: &Path) -> Result<bool, StoreError> {
        if dir.is_dir() {
            return Ok(false);
        }
        if let Ok(found) = fs::symlink_metadata(dir) {
            self.set_aside(dir, found.file_type());
        }
        fs::create_dir_all(dir).map_err(StoreError::file(dir))?;
        Ok(true)
    }

    /// Moves what is not a file, but has a file's name, to `set-aside/`. A failure is logged:
    /// then it stays where it is, and whoever needs the name gets an error.
    pub fn set_aside(&self, path: &Path, found: fs::FileType) {
        let (what, aside) = (regular::describe(found), self.root.join("set-aside"));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut names = (0..SET_ASIDE_MAX).map(|n| match n {
            0 => aside.join(&*name),
            n => aside.join(format!("{name}.{n}")),
        });
        let free = names.find(|name| fs::symlink_metadata(name).is_err());
        let moved = fs::create_dir_all(&aside).and_then(|()| match &free {
            Some(to) => fs::rename(path, to),
            None => Err(io::ErrorKind::AlreadyExists.into()),
        });
        let (path, to) = (path.display(), free.unwrap_or(aside));
        match moved {
            Ok(()) => tracing::warn!("{path}: {what} was here; it is now {}", to.display()),
            Err(error) => {
                tracing::warn!("{path} is {what}; it cannot be moved to {}: {error}", to.display());
            }
        }
    }

    /// Checks that the disk is writable: writes [`PROBE_BYTES`] and deletes them.
    pub fn probe(&self) -> Result<(), StoreError> {
        let temp = self.temp();
        let written = File::create_new(&temp).and_then(|mut file| {
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

    pub fn pins_dir(&self) -> PathBuf {
        self.root.join("pins")
    }

    /// The file that says what a model pins.
    pub fn pin_record(&self, model: ModelId) -> PathBuf {
        self.pins_dir().join(model.to_string())
    }

    /// A name for a new temporary file on the same file system. Nothing has it.
    pub fn temp(&self) -> PathBuf {
        loop {
            let n = self.temps.fetch_add(1, Ordering::Relaxed);
            let temp = self.tmp_dir().join(n.to_string());
            if fs::symlink_metadata(&temp).is_err() {
                return temp;
            }
        }
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
            FileKind::Replica => ".replica",
        };
        self.dir(shard).join(format!("{shard}{suffix}"))
    }

    /// Calls `found` for every object file, with the id and kind that its name says.
    /// Skips other names. Sets aside what has such a name and is not a file; a whole
    /// object may be a link to one.
    pub fn scan(&self, mut found: impl FnMut(ShardId, FileKind, &Path)) -> Result<(), StoreError> {
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
                    Some((id, "replica")) => (id, FileKind::Replica),
                    Some(_) => continue,
                };
                let shard = id.parse::<ShardId>().ok();
                let Some(shard) = shard.filter(|shard| shard.as_bytes()[0] == first) else {
                    continue;
                };
                let path = entry.path();
                match entry.file_type() {
                    Ok(of) if of.is_file() => found(shard, kind, &path),
                    Ok(of)
                        if of.is_symlink()
                            && kind == FileKind::Whole
                            && regular::is_file(&path) =>
                    {
                        found(shard, kind, &path);
                    }
                    Ok(of) => self.set_aside(&path, of),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "left out"),
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
            let mut file = File::create_new(&temp)?;
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
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let mut file = regular::open_own(&mut options, &path).map_err(StoreError::file(&path))?;
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
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = regular::open_own(&mut options, path)?;
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
/// bytes (a hard link made by an import, or a symbolic one), or it is read-only.
pub(super) fn is_foreign(path: &Path) -> io::Result<bool> {
    let meta = fs::metadata(path)?;
    if fs::symlink_metadata(path)?.is_symlink() {
        return Ok(true);
    }
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
    let (from, to) = (regular::open(source)?, File::create_new(to)?);
    rustix::fs::ioctl_ficlone(to, from)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn clone(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Copies bytes but not the mode, so that a copy of a read-only file can be repaired.
pub(super) fn copy(source: &Path, to: &Path) -> io::Result<u64> {
    io::copy(&mut regular::open(source)?, &mut File::create(to)?)
}

/// Free bytes on the file system of a directory; `None` where the system does not say.
#[cfg(unix)]
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
pub(super) fn free_bytes(_: &Path) -> Option<u64> {
    None
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
        fs::create_dir(&temp).unwrap();
        assert_ne!(layout.temp(), temp, "a name that is taken is not given");
    }
}
