//! A Hugging Face checkpoint directory: its configs, and its tensors, read by position from one
//! safetensors file or from several with an index.
//!
//! Everything in a header is checked against the file's real size. Headers and JSON files have size
//! limits. No file is mapped: a read copies.
//!
//! Format: <https://huggingface.co/docs/safetensors> (8-byte little-endian header
//! length, JSON header, data).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::{Checkpoint, Form, Stored};
use super::files::{Files, FromStart, OnDisk, ReadAt, Stretch};
use super::{LoadError, Result, chat, io_error, missing, nested, sentence, sentencepiece, stacks};
use crate::families::SENTENCE_KEY;
use crate::graph::Weight;
use crate::source::Source;
use doppler_store::chat::ChatTemplates;
use doppler_store::manifest::read_eos;
use doppler_store::{DType, regular};

/// The longest safetensors header that is read, in bytes (the format's own limit is 100 MB).
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// The longest `config.json` or `generation_config.json` that is read.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// The longest index or tokenizer that is read.
pub(super) const JSON_BYTES_MAX: u64 = 64 << 20;
/// The most weight files of a checkpoint.
const FILES_MAX: usize = 4096;

/// A tensor, and where its bytes are.
struct Tensor {
    file: usize,
    /// Bytes from the start of the file.
    start: u64,
    bytes: u64,
    stored: Stored,
}

struct WeightFile {
    path: PathBuf,
    file: Box<dyn ReadAt>,
}

/// An opened directory whose headers were checked.
pub struct HuggingFace {
    dir: PathBuf,
    /// `config.json`, or the text model's part of it, with what sentence-transformers' files say.
    config: Value,
    /// `generation_config.json`, `Null` if absent.
    generation_config: Value,
    opener: Arc<dyn Files>,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl HuggingFace {
    pub fn open(dir: &Path, opener: Arc<dyn Files>) -> Result<Self> {
        let generation = dir.join("generation_config.json");
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            config: read_json(&dir.join("config.json"), CONFIG_BYTES_MAX)?,
            generation_config: match generation.exists() {
                true => read_json(&generation, CONFIG_BYTES_MAX)?,
                false => Value::Null,
            },
            opener,
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            checkpoint.tensors = checkpoint.add_file(single)?;
        } else if index.exists() {
            checkpoint.open_indexed(&index)?;
        } else {
            return Err(LoadError::File {
                file: dir.display().to_string(),
                problem: "neither model.safetensors nor model.safetensors.index.json is here"
                    .into(),
            });
        }
        if let Some(text) = nested::text(&checkpoint.config) {
            checkpoint.config = text;
            let tensors = std::mem::take(&mut checkpoint.tensors).into_iter();
            let renamed = |(name, tensor): (String, _)| Some((nested::rename(&name)?, tensor));
            checkpoint.tensors = tensors.filter_map(renamed).collect();
        }
        checkpoint.add_sentence_files()?;
        Ok(checkpoint)
    }

    /// Adds the files of sentence-transformers, if there are any: to the config, and the tensors of
    /// dense heads.
    fn add_sentence_files(&mut self) -> Result<()> {
        let Some(found) = sentence::read(&self.dir)? else { return Ok(()) };
        for (module, file) in found.dense {
            let tensors = self.add_file(file)?.into_iter();
            self.tensors.extend(tensors.map(|(name, tensor)| (format!("{module}.{name}"), tensor)));
        }
        if let Some(config) = self.config.as_object_mut() {
            config.insert(SENTENCE_KEY.to_owned(), found.config);
        }
        Ok(())
    }

    fn open_indexed(&mut self, index: &Path) -> Result<()> {
        let bytes = read_bounded(index, JSON_BYTES_MAX)?;
        let fail = |problem: String| LoadError::File { file: index.display().to_string(), problem };
        let by_file = index_files(&bytes).map_err(fail)?;
        for (file, tensors) in by_file {
            let path = index.with_file_name(&file);
            if !path.exists() {
                return Err(fail(format!(
                    "it needs {file} (for {}), which is not here",
                    tensors[0]
                )));
            }
            let mut entries = self.add_file(path)?;
            for tensor in tensors {
                let (name, entry) = entries.remove_entry(&tensor).ok_or_else(|| {
                    fail(format!("it names {tensor} in {file}, which does not have it"))
                })?;
                self.tensors.insert(name, entry);
            }
        }
        Ok(())
    }

    /// Opens a weight file and reads its header.
    fn add_file(&mut self, path: PathBuf) -> Result<BTreeMap<String, Tensor>> {
        let io = io_error(&path);
        let file = self.opener.open(&path).map_err(io)?;
        let entries = read_header(FromStart::new(&*file), file.size(), self.files.len())
            .map_err(|problem| LoadError::File { file: path.display().to_string(), problem })?;
        self.files.push(WeightFile { path, file });
        Ok(entries)
    }
}

impl HuggingFace {
    /// The bytes of a tensor of any type, from byte `offset` of it on. They must be within it.
    pub(super) fn read_bytes(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let Some(tensor) = self.tensors.get(name) else { return Err(missing(self, name)) };
        debug_assert!(offset + out.len() as u64 <= tensor.bytes, "{name} ends before");
        let weights = &self.files[tensor.file];
        let read = weights.file.read_at(tensor.start + offset, out);
        read.map_err(io_error(&weights.path))
    }

    /// Where a tensor's bytes are.
    fn stretch(&self, name: &str) -> Option<Stretch<'_>> {
        let tensor = self.tensors.get(name)?;
        let path = &self.files[tensor.file].path;
        Some(Stretch { path, start: tensor.start, bytes: tensor.bytes })
    }

    /// Bytes that a tensor takes in its file. `None` if there is no such tensor.
    pub(super) fn bytes(&self, name: &str) -> Option<u64> {
        self.tensors.get(name).map(|tensor| tensor.bytes)
    }
}

impl Checkpoint for HuggingFace {
    fn place(&self) -> String {
        self.dir.display().to_string()
    }

    fn name(&self) -> String {
        let full = std::path::absolute(&self.dir).unwrap_or_else(|_| self.dir.clone());
        full.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json` takes precedence over `config.json`.
    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let mut configs = [&self.generation_config, &self.config].into_iter();
        let eos = configs.find_map(|config| config.get("eos_token_id").filter(|v| !v.is_null()));
        Ok(read_eos(eos.unwrap_or(&Value::Null))?)
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join("tokenizer.json");
        match path.exists() {
            true => read_bounded(&path, JSON_BYTES_MAX).map(Some),
            false => sentencepiece::tokenizer(&self.dir),
        }
    }

    fn chat_templates(&self) -> Result<Option<ChatTemplates>> {
        chat::read(&self.dir)
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name).map(|tensor| &tensor.stored)
    }

    fn source<'a>(&self, weight: &'a Weight) -> Cow<'a, Source> {
        stacks::source(self, weight)
    }

    fn expect(&self, names: &[&str]) {
        let order: Vec<_> = names.iter().filter_map(|name| self.stretch(name)).collect();
        self.opener.expect(&order);
    }

    fn release(&self, name: &str) {
        if let Some(stretch) = self.stretch(name) {
            self.opener.release(stretch);
        }
    }

    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        let Some(tensor) = self.tensors.get(name) else { return Err(missing(self, name)) };
        let (_, cols) = tensor.stored.rows_cols();
        let row = tensor.stored.dtype().map_or(0, |dtype| dtype.row_bytes(cols as usize) as u64);
        self.read_bytes(name, first * row, out)
    }
}

/// Reads and checks a header against the file's size.
fn read_header(
    mut file: impl Read,
    size: u64,
    index: usize,
) -> std::result::Result<BTreeMap<String, Tensor>, String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| format!("truncated: only {size} bytes"))?;
    if length == LFS_POINTER[..8] {
        let mut pointer = length.to_vec();
        let mut rest = file.by_ref().take(LFS_POINTER_BYTES_MAX);
        rest.read_to_end(&mut pointer).map_err(|e| e.to_string())?;
        if let Some(problem) = lfs_pointer(&pointer) {
            return Err(problem);
        }
    }
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(format!("its header claims {length} bytes (at most {HEADER_BYTES_MAX})"));
    }
    if length > size - 8 {
        return Err(format!("truncated: a header of {length} bytes in a file of {size}"));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(|e| e.to_string())?;
    let header: BTreeMap<String, Value> =
        serde_json::from_slice(&header).map_err(|e| format!("its header is not JSON: {e}"))?;
    let data = 8 + length;
    let mut entries = BTreeMap::new();
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry =
            serde_json::from_value(value).map_err(|e| format!("its header, tensor {name}: {e}"))?;
        let tensor = check_entry(entry, data, size - data, index)
            .map_err(|problem| format!("tensor {name}: {problem}"))?;
        entries.insert(name, tensor);
    }
    Ok(entries)
}

fn check_entry(
    entry: Entry,
    data: u64,
    data_size: u64,
    file: usize,
) -> std::result::Result<Tensor, String> {
    let (start, end) = entry.data_offsets;
    if start > end {
        return Err(format!("its offsets {start}..{end} are reversed"));
    }
    if end > data_size {
        return Err(format!(
            "truncated: it ends at byte {end} of the data, and the file has {data_size}"
        ));
    }
    let (size, form) = match entry.dtype.as_str() {
        "F32" => (4, Form::Blocks(DType::F32)),
        "F16" => (2, Form::Blocks(DType::F16)),
        "BF16" => (2, Form::Blocks(DType::Bf16)),
        other => (element_bytes(other), Form::Unreadable(other.to_owned())),
    };
    let elements = entry.shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim));
    let bytes = elements.and_then(|n| n.checked_mul(size));
    if size > 0 && bytes != Some(end - start) {
        return Err(format!(
            "{} bytes, but {} of shape {:?} takes {}",
            end - start,
            entry.dtype,
            entry.shape,
            bytes.map_or("more than fits".into(), |b| b.to_string()),
        ));
    }
    let stored = Stored { shape: entry.shape, form };
    Ok(Tensor { file, start: data + start, bytes: end - start, stored })
}

/// Bytes of an element of a type that only packed weights have; 0 if it is not known.
fn element_bytes(dtype: &str) -> u64 {
    match dtype {
        "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "I32" | "U32" => 4,
        "I64" => 8,
        _ => 0,
    }
}

/// The tensors of each file that a `model.safetensors.index.json` names: at least one file, all with
/// names that stay in the index's directory.
fn index_files(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Vec<String>>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        if !is_plain(&file) {
            return Err(format!("{file:?} is not a plain file name"));
        }
        by_file.entry(file).or_default().push(tensor);
    }
    match by_file.len() {
        1..=FILES_MAX => Ok(by_file),
        count => Err(format!("it names {count} files (1..={FILES_MAX})")),
    }
}

/// Reads an index of weight files. Returns the number of tensors of each file. For tests and fuzzing.
///
/// # Errors
/// As opening a checkpoint, without the file's name.
pub fn probe_index(bytes: &[u8]) -> std::result::Result<BTreeMap<String, usize>, String> {
    Ok(index_files(bytes)?.into_iter().map(|(file, tensors)| (file, tensors.len())).collect())
}

/// Reads the header of a safetensors file from its bytes. Returns where each tensor's bytes are. For
/// tests and fuzzing.
///
/// # Errors
/// As opening a checkpoint, without the file's name.
pub fn probe_safetensors(
    bytes: &[u8],
) -> std::result::Result<BTreeMap<String, std::ops::Range<u64>>, String> {
    let tensors = read_header(bytes, bytes.len() as u64, 0)?.into_iter();
    Ok(tensors.map(|(name, tensor)| (name, tensor.start..tensor.start + tensor.bytes)).collect())
}

/// A file name that stays in its directory.
pub(crate) fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
        && !name.contains(['\\', '\0', ':'])
}

/// How a Git LFS pointer begins, the file that stands in for a large file until it is fetched.
const LFS_POINTER: &[u8; 34] = b"version https://git-lfs.github.com";
/// The format's own limit on a pointer.
const LFS_POINTER_BYTES_MAX: u64 = 1024;

/// The problem, if these bytes are a pointer instead of a file's content.
///
/// Format: <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>
fn lfs_pointer(bytes: &[u8]) -> Option<String> {
    let text = bytes.starts_with(LFS_POINTER).then(|| String::from_utf8_lossy(bytes))?;
    let size = text.lines().find_map(|line| line.strip_prefix("size "));
    let size = size.map_or(String::new(), |size| format!(" of {size} bytes"));
    Some(format!("a Git LFS pointer, not the file itself{size}; fetch it with: git lfs pull"))
}

/// The largest file of weights that is read as a whole.
const WHOLE_BYTES_MAX: u64 = 2 << 30;

/// The tensors of one safetensors file, without a config.
pub(crate) fn open_safetensors(path: &Path) -> Result<impl Checkpoint + use<>> {
    let mut opened = HuggingFace {
        dir: path.to_owned(),
        config: Value::Null,
        generation_config: Value::Null,
        opener: Arc::new(OnDisk),
        files: Vec::new(),
        tensors: BTreeMap::new(),
    };
    opened.tensors = opened.add_file(path.to_owned())?;
    Ok(opened)
}

/// A JSON file of the size of a config.
pub(crate) fn read_small_json(path: &Path) -> Result<Value> {
    read_json(path, CONFIG_BYTES_MAX)
}

/// A JSON file that may have weights in it.
pub(crate) fn read_big_json(path: &Path) -> Result<Value> {
    read_json(path, 4 * JSON_BYTES_MAX)
}

/// A file's bytes.
pub(crate) fn read_whole(path: &Path) -> Result<Vec<u8>> {
    read_bounded(path, WHOLE_BYTES_MAX)
}

pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = io_error(path);
    let mut bytes = Vec::new();
    regular::open(path).map_err(&io)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(LoadError::File {
            file: path.display().to_string(),
            problem: format!("more than {limit} bytes"),
        });
    }
    if let Some(problem) = lfs_pointer(&bytes) {
        return Err(LoadError::File { file: path.display().to_string(), problem });
    }
    Ok(bytes)
}

pub(super) fn read_json(path: &Path, limit: u64) -> Result<Value> {
    let bytes = read_bounded(path, limit)?;
    serde_json::from_slice(&bytes).map_err(|e| LoadError::File {
        file: path.display().to_string(),
        problem: format!("not valid JSON: {e}"),
    })
}
