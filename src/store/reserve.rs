//! The reserve: a file of noise in the data directory. It is deleted when the disk
//! is full, so that there is space to write what cleaning up needs: have-files and
//! the index.
//!
//! Invariant: the file is whole or absent. It does not count against the budget.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{files, regular};

/// Size of the reserve, enough for several index segments (512 KiB each in sled) and
/// thousands of have-files.
pub(super) const RESERVE_BYTES: u64 = 4 * 1024 * 1024;

const BLOCK_BYTES: usize = 64 * 1024;

pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    /// Held while the file is written or deleted.
    changing: Mutex<()>,
}

impl Reserve {
    /// The reserve of a data directory. Writes nothing yet.
    pub fn of(root: &Path, bytes: u64) -> Self {
        Self { path: root.join("reserve"), bytes, changing: Mutex::default() }
    }

    pub fn is_held(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| meta.len() >= self.bytes)
    }

    /// Deletes the file. True if there was one.
    pub fn release(&self) -> bool {
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        fs::remove_file(&self.path).is_ok()
    }

    /// Writes the file if it is absent or incomplete. After an error it uses no space.
    pub fn set_aside(&self) -> io::Result<()> {
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_held() {
            return Ok(());
        }
        // Do not fill the disk just to find out that it is full: other programs use it too.
        let free = self.path.parent().and_then(files::free_bytes);
        if free.is_some_and(|free| free < 2 * self.bytes) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.write();
        if written.is_err() {
            let _ = fs::remove_file(&self.path);
        }
        written
    }

    /// Writes noise, because a compressing file system would not reserve space for zeroes.
    fn write(&self) -> io::Result<()> {
        let mut noise = blake3::Hasher::new().update(b"reserve").finalize_xof();
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let mut file = regular::open_own(&mut options, &self.path)?;
        let mut block = vec![0; BLOCK_BYTES];
        let mut left = self.bytes as usize;
        while left > 0 {
            let now = left.min(BLOCK_BYTES);
            noise.fill(&mut block[..now]);
            file.write_all(&block[..now])?;
            left -= now;
        }
        // Some file systems report a full disk only on sync.
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_set_aside_released_and_set_aside_again() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(dir.path(), 100_000);
        assert!(!reserve.is_held() && !reserve.release());
        reserve.set_aside().unwrap();
        assert!(reserve.is_held());
        assert_eq!(fs::metadata(dir.path().join("reserve")).unwrap().len(), 100_000);
        fs::write(dir.path().join("reserve"), "cut short").unwrap();
        assert!(!reserve.is_held());
        reserve.set_aside().unwrap();
        assert!(reserve.is_held() && reserve.release());
        let nowhere = Reserve::of(&dir.path().join("missing"), 1);
        assert!(nowhere.set_aside().is_err() && !nowhere.is_held());
    }
}
