//! Where a conversion's shards go: a directory that appears whole, or memory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::{LoadError, Result, io_error};
use doppler_store::{Found, RangeReader, ReadError, ReadRequest, ShardId, Tier};

/// Takes shards in order, then the files beside them, then the manifest.
pub trait ShardSink {
    /// A finished shard; `id` is the hash of `bytes`.
    fn shard(&mut self, filename: &str, id: ShardId, bytes: Vec<u8>) -> Result<()>;

    /// A file beside the shards, such as the tokenizer.
    fn file(&mut self, name: &str, bytes: Vec<u8>) -> Result<()>;

    /// The last call: `manifest.json`, after which the model is complete.
    fn finish(&mut self, manifest: Vec<u8>) -> Result<()>;
}

/// Writes into a hidden directory beside the output, synced file by file, and
/// renames it into place at the end. Dropped before that, it removes what it wrote.
pub struct DirSink {
    out: PathBuf,
    /// Made with the first file.
    partial: Option<PathBuf>,
}

impl DirSink {
    /// Refuses an output that exists, unless it is an empty directory. Writes nothing yet.
    pub fn new(out: &Path) -> Result<Self> {
        if out.symlink_metadata().is_ok() {
            let mut entries = fs::read_dir(out)
                .map_err(|_| LoadError::OutputExists(out.display().to_string()))?;
            if entries.next().is_some() {
                return Err(LoadError::OutputExists(out.display().to_string()));
            }
        }
        if out.file_name().is_none() {
            return Err(LoadError::OutputExists(out.display().to_string()));
        }
        Ok(Self { out: out.to_owned(), partial: None })
    }

    /// The directory the output lies in.
    fn parent(&self) -> &Path {
        match self.out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    fn partial(&mut self) -> Result<&Path> {
        if self.partial.is_none() {
            let name = self.out.file_name().unwrap_or_default().to_string_lossy();
            let unique =
                format!(".{name}.partial-{}-{:08x}", std::process::id(), rand::random::<u32>());
            let path = self.parent().join(unique);
            fs::create_dir_all(&path).map_err(io_error(&path))?;
            self.partial = Some(path);
        }
        Ok(self.partial.as_deref().expect("made above"))
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.partial()?.join(name);
        let io = io_error(&path);
        let mut file = File::create_new(&path).map_err(&io)?;
        file.write_all(bytes).map_err(&io)?;
        file.sync_all().map_err(io)
    }
}

impl ShardSink for DirSink {
    fn shard(&mut self, filename: &str, _id: ShardId, bytes: Vec<u8>) -> Result<()> {
        self.write(filename, &bytes)
    }

    fn file(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.write(name, &bytes)
    }

    fn finish(&mut self, manifest: Vec<u8>) -> Result<()> {
        self.write("manifest.json", &manifest)?;
        let partial = self.partial()?.to_owned();
        sync_dir(&partial)?;
        // An empty directory in the way is removed; anything else makes the rename fail.
        let _ = fs::remove_dir(&self.out);
        fs::rename(&partial, &self.out).map_err(io_error(&self.out))?;
        self.partial = None;
        sync_dir(self.parent())
    }
}

impl Drop for DirSink {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            let _ = fs::remove_dir_all(partial);
        }
    }
}

/// Makes names in a directory durable, where the system can.
fn sync_dir(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|dir| dir.sync_all()).map_err(io_error(path))?;
    }
    Ok(())
}

/// Keeps a model in memory, by content address: shards, tokenizer and manifest.
#[derive(Debug, Default, Clone)]
pub struct MemorySink {
    objects: HashMap<ShardId, Bytes>,
}

impl MemorySink {
    /// The whole object.
    pub fn get(&self, id: ShardId) -> Option<Bytes> {
        self.objects.get(&id).cloned()
    }

    /// Bytes of all objects.
    pub fn size(&self) -> u64 {
        self.objects.values().map(|bytes| bytes.len() as u64).sum()
    }
}

impl ShardSink for MemorySink {
    fn shard(&mut self, _filename: &str, id: ShardId, bytes: Vec<u8>) -> Result<()> {
        self.objects.insert(id, bytes.into());
        Ok(())
    }

    fn file(&mut self, _name: &str, bytes: Vec<u8>) -> Result<()> {
        self.objects.insert(ShardId::of(&bytes), bytes.into());
        Ok(())
    }

    fn finish(&mut self, manifest: Vec<u8>) -> Result<()> {
        self.file("manifest.json", manifest)
    }
}

impl RangeReader for MemorySink {
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, std::result::Result<Found, ReadError>> {
        let ReadRequest { shard, range, .. } = request;
        let found = match self.objects.get(&shard) {
            None => Err(ReadError::NotFound { shard, waited: Duration::ZERO }),
            Some(bytes) if range.end() > bytes.len() as u64 => {
                Err(ReadError::OutOfRange { shard, range, size: bytes.len() as u64 })
            }
            // Bounded by the object's length, which is a usize.
            Some(bytes) => Ok(Found {
                bytes: bytes.slice(range.start() as usize..range.end() as usize),
                tier: Tier::Ram,
            }),
        };
        futures::future::ready(found).boxed()
    }
}
