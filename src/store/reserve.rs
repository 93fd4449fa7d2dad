//! The reserve: space in the data directory held by a file that means nothing,
//! given up when the disk is full, so that what must be written to clean up
//! (have-files, the index) can be.
//!
//! Invariant: the file is whole or absent. It does not count against the budget.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Bytes of the reserve: several of the index's segments (sled's are 512 KiB)
/// and thousands of have-files.
pub(super) const RESERVE_BYTES: u64 = 4 * 1024 * 1024;

const BLOCK_BYTES: usize = 64 * 1024;

pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    /// Nobody takes it back while another gives it up.
    changing: Mutex<()>,
}

impl Reserve {
    /// The reserve of a data directory; nothing is written yet.
    pub fn of(root: &Path, bytes: u64) -> Self {
        Self { path: root.join("reserve"), bytes, changing: Mutex::default() }
    }

    pub fn is_held(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| meta.len() >= self.bytes)
    }

    /// Frees the space. True if there was any.
    pub fn release(&self) -> bool {
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        fs::remove_file(&self.path).is_ok()
    }

    /// Sets the space aside (again). An error leaves none of it in use.
    pub fn set_aside(&self) -> io::Result<()> {
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_held() {
            return Ok(());
        }
        // Filling a disk to find out that it is full would hurt whoever else writes to it.
        if free_bytes(&self.path).is_some_and(|free| free < 2 * self.bytes) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.write();
        if written.is_err() {
            let _ = fs::remove_file(&self.path);
        }
        written
    }

    /// Not zeroes: a file system that compresses would set nothing aside.
    fn write(&self) -> io::Result<()> {
        let mut noise = blake3::Hasher::new().update(b"reserve").finalize_xof();
        let mut file = File::create(&self.path)?;
        let mut block = vec![0; BLOCK_BYTES];
        let mut left = self.bytes as usize;
        while left > 0 {
            let now = left.min(BLOCK_BYTES);
            noise.fill(&mut block[..now]);
            file.write_all(&block[..now])?;
            left -= now;
        }
        // Some file systems find out only here that there is no room.
        file.sync_all()
    }
}

/// Bytes that may still be written to the file system that `path` is (to be) on.
#[cfg(unix)]
fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path.parent()?).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_given_up_and_taken_again() {
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
