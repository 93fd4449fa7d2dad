//! Errors of opening the store and of storing objects. Reads have their own
//! [`ReadError`](super::ReadError).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::verified::OBJECT_BYTES_MAX;
use super::{ReadError, ShardId};

/// Why the store could not be opened, or did not store an object.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "{} is in use by another doppler-node{}; stop it or choose another data directory",
        dir.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Locked { dir: PathBuf, holder: Option<u32> },
    /// The object does not fit beside what is pinned or in use. Sizes in bytes.
    #[error(
        "disk budget too small: {needed} bytes needed, {available} available \
         (budget {budget} bytes, the rest is pinned, in use, or held by too few other nodes)"
    )]
    Budget { needed: u64, available: u64, budget: u64 },
    /// As [`Self::Budget`], for a store without a data directory.
    #[error("RAM budget too small: {needed} bytes needed, {available} available")]
    Memory { needed: u64, available: u64 },
    #[error("{what}: {size} bytes is more than an object may have ({OBJECT_BYTES_MAX})")]
    TooLarge { what: String, size: u64 },
    #[error("{}: its BLAKE3 is {actual}, not {expected}", path.display())]
    Mismatch { path: PathBuf, expected: ShardId, actual: ShardId },
    #[error("shard {0} is not in the store")]
    NotHeld(ShardId),
    #[error("the store needs a data directory to {0}")]
    NoDisk(&'static str),
    /// The file system has no room left, although the budget may allow more. What is lacking is
    /// said where it is known.
    #[error(
        "{what}: the disk is full{}; free space on it, or drop cached shards: \
         doppler-node gc --disk-budget SIZE",
        lack.map(|lack| format!(": {lack}")).unwrap_or_default()
    )]
    Full { what: String, lack: Option<Lack> },
    /// The data directory is read-only or belongs to another user.
    #[error("{what}: {source}; a node must be able to read and write its data directory")]
    Denied { what: String, source: io::Error },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

/// What a full disk lacks, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    pub needed: u64,
    pub available: u64,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needed, available } = *self;
        match needed.checked_sub(available).filter(|missing| *missing > 0) {
            Some(missing) => write!(
                f,
                "{missing} bytes are missing ({needed} bytes needed, {available} available)"
            ),
            // The file system has the bytes, but does not give them.
            None => write!(
                f,
                "{needed} bytes needed, {available} free, but a quota or the number of files is \
                 used up"
            ),
        }
    }
}

impl StoreError {
    /// Whether the disk is full.
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Classifies an I/O error by what can be done about it.
    pub(super) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { what, lack: None }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied { what, source }
            }
            _ => Self::Io { what, source },
        }
    }

    /// Classifies an I/O error and names the file.
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::io(path.display().to_string(), source)
    }

    /// A stable name for metrics and JSON.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Locked { .. } => "locked",
            Self::Budget { .. } | Self::Memory { .. } => "budget",
            Self::TooLarge { .. } => "too_large",
            Self::Mismatch { .. } => "mismatch",
            Self::NotHeld(_) => "not_held",
            Self::NoDisk(_) => "no_disk",
            Self::Full { .. } => "disk_full",
            Self::Denied { .. } => "denied",
            Self::Io { .. } => "io",
        }
    }
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Io { what, source } => Self::Io { what, source },
            other => Self::Refused(other.to_string()),
        }
    }
}
