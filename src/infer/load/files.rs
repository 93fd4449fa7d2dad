//! How a checkpoint's weight files are read: from this disk, or by somebody who is still fetching
//! them.
//!
//! Small files (configs, tokenizers) are always read from the disk. Invariant: whoever implements
//! [`Files`] may know when bytes will be needed and when they no longer are, but a read of any bytes
//! at any time gives them or fails.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use doppler_store::regular;

/// An opened weight file.
pub trait ReadAt: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `out` with the bytes from `offset` on. May wait for them.
    ///
    /// # Errors
    /// If the file ends before, or the bytes do not come.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

/// Some bytes of a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch<'a> {
    pub path: &'a Path,
    /// Bytes from the start of the file.
    pub start: u64,
    pub bytes: u64,
}

/// Opens weight files.
pub trait Files: Send + Sync {
    /// # Errors
    /// If there is no such file.
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>>;

    /// Each of these will be read, in about this order, and then released. Called at most once.
    fn expect(&self, _order: &[Stretch<'_>]) {}

    /// What was read of it is durable elsewhere.
    fn release(&self, _stretch: Stretch<'_>) {}
}

/// The files of this disk.
pub struct OnDisk;

impl Files for OnDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        let file = regular::open(path)?;
        let size = file.metadata()?.len();
        Ok(Box::new(DiskFile { size, file: Mutex::new(file) }))
    }
}

struct DiskFile {
    size: u64,
    file: Mutex<File>,
}

impl ReadAt for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(out)
    }
}

/// Reads a file from its start on, for headers.
pub(super) struct FromStart<'a> {
    of: &'a dyn ReadAt,
    at: u64,
}

impl<'a> FromStart<'a> {
    pub fn new(of: &'a dyn ReadAt) -> Self {
        Self { of, at: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.of.size() - self.at).unwrap_or(usize::MAX);
        let count = out.len().min(left);
        self.of.read_at(self.at, &mut out[..count])?;
        self.at += count as u64;
        Ok(count)
    }
}
