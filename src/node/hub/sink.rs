//! Where a pulled model's shards go: a directory on the store's disk, from which the store takes them
//! over without a copy. What a killed pull has finished stays there.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::HubError;
use super::journal::Record;
use crate::size::ByteSize;
use doppler_infer::load::{LoadError, ShardSink};
use doppler_store::ShardId;

/// Notes what is durable.
type Note<'a> = &'a dyn Fn(&Record) -> Result<(), HubError>;

/// See the module.
pub struct PullSink<'a> {
    dir: PathBuf,
    finished: Vec<(ShardId, u64)>,
    note: Note<'a>,
    /// Bytes that the store has room for, if a node says so.
    room: Option<u64>,
    /// Bytes of the download that may lie on the disk beside the shards.
    beside: u64,
    /// Set by the first failure that is not the conversion's own.
    pub failure: Option<HubError>,
}

impl<'a> PullSink<'a> {
    /// Takes over the shards that the journal tells of and that are there.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(
        dir: PathBuf,
        records: &[Record],
        note: Note<'a>,
        room: Option<u64>,
        beside: u64,
    ) -> Result<Self, HubError> {
        fs::create_dir_all(&dir).map_err(HubError::io(&dir))?;
        let mut finished = Vec::new();
        for record in records {
            let Record::Shard { id, size } = record else { continue };
            let file = dir.join(filename(finished.len()));
            if !fs::metadata(&file).is_ok_and(|found| found.len() == *size) {
                break;
            }
            finished.push((*id, *size));
        }
        Ok(Self { dir, finished, note, room, beside, failure: None })
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> doppler_infer::load::Result<()> {
        let path = self.dir.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|source| {
            self.failure = Some(HubError::io(&path)(copy(&source)));
            LoadError::Io { path: path.display().to_string(), source }
        })
    }

    fn fail(&mut self, error: HubError) -> LoadError {
        self.failure = Some(error.clone());
        let path = self.dir.display().to_string();
        LoadError::Io { path, source: std::io::Error::other(error) }
    }
}

fn copy(error: &std::io::Error) -> std::io::Error {
    std::io::Error::new(error.kind(), error.to_string())
}

/// The name that a conversion gives a shard.
fn filename(number: usize) -> String {
    format!("shard_{number:05}.bin")
}

impl ShardSink for PullSink<'_> {
    fn begin(&mut self, bytes: u64) -> doppler_infer::load::Result<()> {
        if let Some(room) = self.room.filter(|room| *room < bytes) {
            let (bytes, room) = (ByteSize(bytes), ByteSize(room));
            return Err(self.fail(HubError::Room(format!(
                "the model takes {bytes}, and the node's disk budget has {room} that is not pinned: \
                 unpin or rm something, or join with a larger --disk-budget"
            ))));
        }
        let finished: u64 = self.finished.iter().map(|(_, size)| size).sum();
        let needed = bytes.saturating_sub(finished).saturating_add(self.beside);
        if let Some(free) = free_space(&self.dir).filter(|free| *free < needed) {
            let (needed, free, dir) = (ByteSize(needed), ByteSize(free), self.dir.display());
            return Err(self.fail(HubError::Room(format!(
                "the model needs {needed} more on the disk of {dir}, which has {free} left: make \
                 room, or choose another --data"
            ))));
        }
        Ok(())
    }

    fn finished(&self) -> Vec<(ShardId, u64)> {
        self.finished.clone()
    }

    fn shard(
        &mut self,
        filename: &str,
        id: ShardId,
        bytes: Vec<u8>,
    ) -> doppler_infer::load::Result<()> {
        self.write(filename, &bytes)?;
        let record = Record::Shard { id, size: bytes.len() as u64 };
        (self.note)(&record).map_err(|error| self.fail(error))
    }

    fn file(&mut self, name: &str, bytes: Vec<u8>) -> doppler_infer::load::Result<()> {
        self.write(name, &bytes)
    }

    fn finish(&mut self, manifest: Vec<u8>) -> doppler_infer::load::Result<()> {
        self.write("manifest.json", &manifest)
    }
}

/// Bytes that may still be written to a directory's file system. `None` if that is not known.
#[cfg(unix)]
fn free_space(dir: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(dir).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free_space(_dir: &Path) -> Option<u64> {
    None
}
