//! An RDRR directory as a checkpoint: `manifest.json`, shards, tokenizer.
//!
//! Every byte returned was verified: a shard is hashed in full when it is read, the tokenizer is
//! compared with the manifest. One shard is kept in memory at a time.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::checkpoint::{Checkpoint, Form, Stored};
use super::hf::{JSON_BYTES_MAX, read_bounded};
use super::{LoadError, Result, io_error};
use crate::graph::Weight;
use crate::source::Source;
use doppler_store::chat::ChatTemplates;
use doppler_store::dir::{DirReader, DirShard};
use doppler_store::{Manifest, RangeReader, ShardId, regular};
use std::collections::BTreeMap;

/// An opened directory.
pub struct Rdrr {
    dir: PathBuf,
    manifest: Manifest,
    tensors: BTreeMap<String, Stored>,
    /// The shard read last, and its bytes.
    shard: Mutex<Option<(u32, Vec<u8>)>>,
}

impl Rdrr {
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read_dir(dir).map_err(|error| LoadError::File {
            file: dir.join("manifest.json").display().to_string(),
            problem: error.to_string(),
        })?;
        let tensors = manifest.tensors.iter().map(|(name, tensor)| {
            let stored = Stored { shape: tensor.shape.clone(), form: Form::Blocks(tensor.dtype) };
            (name.to_owned(), stored)
        });
        let tensors = tensors.collect();
        Ok(Self { dir: dir.to_owned(), manifest, tensors, shard: Mutex::default() })
    }

    /// Reads a shard and verifies it.
    fn load(&self, index: u32) -> Result<Vec<u8>> {
        let shard = &self.manifest.shards[index as usize];
        let path = self.dir.join(&shard.filename);
        let bytes = regular::read(&path).map_err(io_error(&path))?;
        if bytes.len() as u64 != shard.size || !shard.hash.matches(&bytes) {
            let problem = "damaged: its hash is not the one in the manifest".to_owned();
            return Err(LoadError::File { file: path.display().to_string(), problem });
        }
        Ok(bytes)
    }
}

impl Checkpoint for Rdrr {
    fn place(&self) -> String {
        self.dir.display().to_string()
    }

    fn name(&self) -> String {
        self.manifest.model_id.clone()
    }

    fn config(&self) -> &Value {
        &self.manifest.config
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        Ok(self.manifest.eos_token_ids.clone())
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        let Some(entry) = &self.manifest.tokenizer else { return Ok(None) };
        let path = self.dir.join(&entry.file);
        let bytes = read_bounded(&path, JSON_BYTES_MAX)?;
        let right = entry.size.is_none_or(|size| size == bytes.len() as u64)
            && entry.id.is_none_or(|id| id == ShardId::of(&bytes));
        if !right {
            let problem = "not the file that the manifest names: its hash differs; copy or \
                           convert the model again"
                .to_owned();
            return Err(LoadError::File { file: path.display().to_string(), problem });
        }
        Ok(Some(bytes))
    }

    fn chat_templates(&self) -> Result<Option<ChatTemplates>> {
        Ok(self.manifest.chat.clone())
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name)
    }

    fn source<'a>(&self, _: &'a Weight) -> Cow<'a, Source> {
        Cow::Owned(Source::Itself)
    }

    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        let Some(tensor) = self.manifest.tensors.get(name) else {
            return Err(super::missing(self, name));
        };
        // Where the wanted bytes begin, counted from the start of the current span.
        let mut skip = first * tensor.dtype.row_bytes(tensor.rows_cols().1 as usize) as u64;
        let mut out = out;
        let mut last = self.shard.lock().unwrap_or_else(PoisonError::into_inner);
        for span in &tensor.spans {
            if out.is_empty() {
                break;
            }
            if skip >= span.size {
                skip -= span.size;
                continue;
            }
            let shard = match last.take_if(|(index, _)| *index == span.shard) {
                Some((_, bytes)) => bytes,
                None => self.load(span.shard)?,
            };
            // In a checked manifest, spans are within their shards, which are at most 64 MiB.
            let from = (span.offset + skip) as usize;
            let count = ((span.size - skip) as usize).min(out.len());
            let (now, later) = out.split_at_mut(count);
            now.copy_from_slice(&shard[from..from + count]);
            (out, skip) = (later, 0);
            *last = Some((span.shard, shard));
        }
        Ok(())
    }

    fn manifest(&self) -> Option<&Manifest> {
        Some(&self.manifest)
    }

    fn shards(&self) -> Result<Arc<dyn RangeReader>> {
        let shards = self.manifest.shards.iter().map(|shard| {
            let path = self.dir.join(&shard.filename);
            Ok(DirShard { shard: shard.id()?, path, size: shard.size })
        });
        Ok(Arc::new(DirReader::new(shards.collect::<Result<Vec<_>>>()?)))
    }
}
