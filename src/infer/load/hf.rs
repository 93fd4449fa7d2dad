//! A Hugging Face checkpoint directory: its configs, and its tensors read by
//! position from one safetensors file or several with an index.
//!
//! Nothing in a header is believed before it is checked against the file's real
//! size; headers and JSON files are bounded. No file is mapped: a read copies.
//!
//! Format: <https://huggingface.co/docs/safetensors> (8-byte little-endian header
//! length, JSON header, data).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use serde_json::Value;

use super::{LoadError, Result, io_error};
use doppler_store::DType;

/// The longest safetensors header read, bytes (the format's own limit is 100 MB).
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// The longest `config.json` or `generation_config.json` read.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// The longest index or tokenizer read.
const JSON_BYTES_MAX: u64 = 64 << 20;
/// The most weight files of a checkpoint.
const FILES_MAX: usize = 4096;

/// One tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: usize,
    /// From the start of the file, bytes.
    start: u64,
    /// Bytes: `rows * cols` elements.
    pub size: u64,
    /// F32, F16 or BF16.
    pub dtype: DType,
    pub shape: Vec<u64>,
}

struct WeightFile {
    path: PathBuf,
    file: Mutex<File>,
}

/// An opened checkpoint whose headers were checked.
pub struct Checkpoint {
    dir: PathBuf,
    /// `config.json`, as it stands.
    pub config: Value,
    /// `generation_config.json`, `Null` if absent.
    pub generation_config: Value,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Source>,
    /// Tensors of a type that is not read here, and its name.
    foreign: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Checkpoint {
    /// Reads `config.json` only: enough to tell whether the model is known.
    pub fn read_config(dir: &Path) -> Result<Value> {
        read_json(&dir.join("config.json"), CONFIG_BYTES_MAX)
    }

    pub fn open(dir: &Path) -> Result<Self> {
        let generation = dir.join("generation_config.json");
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            config: Self::read_config(dir)?,
            generation_config: match generation.exists() {
                true => read_json(&generation, CONFIG_BYTES_MAX)?,
                false => Value::Null,
            },
            files: Vec::new(),
            tensors: BTreeMap::new(),
            foreign: BTreeMap::new(),
        };
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            let entries = checkpoint.add_file(single)?;
            checkpoint.add_entries(entries);
        } else if index.exists() {
            checkpoint.open_indexed(&index)?;
        } else {
            return Err(LoadError::File {
                file: dir.display().to_string(),
                problem: "neither model.safetensors nor model.safetensors.index.json is here"
                    .into(),
            });
        }
        Ok(checkpoint)
    }

    fn open_indexed(&mut self, index: &Path) -> Result<()> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = read_bounded(index, JSON_BYTES_MAX)?;
        let fail = |problem: String| LoadError::File { file: index.display().to_string(), problem };
        let parsed: Index = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in &parsed.weight_map {
            if !is_plain(file) {
                return Err(fail(format!("{file:?} is not a plain file name")));
            }
            by_file.entry(file).or_default().push(tensor);
        }
        if by_file.is_empty() || by_file.len() > FILES_MAX {
            return Err(fail(format!("it names {} files (1..={FILES_MAX})", by_file.len())));
        }
        for (file, tensors) in by_file {
            let path = index.with_file_name(file);
            if !path.exists() {
                return Err(fail(format!(
                    "it needs {file} (for {}), which is not here",
                    tensors[0]
                )));
            }
            let mut entries = self.add_file(path)?;
            for tensor in tensors {
                let entry = entries.remove_entry(tensor).ok_or_else(|| {
                    fail(format!("it names {tensor} in {file}, which does not have it"))
                })?;
                self.add_entries([entry].into());
            }
        }
        Ok(())
    }

    /// Opens a weight file and reads its header.
    fn add_file(&mut self, path: PathBuf) -> Result<BTreeMap<String, Raw>> {
        let io = io_error(&path);
        let mut file = File::open(&path).map_err(&io)?;
        let size = file.metadata().map_err(&io)?.len();
        let entries = read_header(&mut file, size, self.files.len())
            .map_err(|problem| LoadError::File { file: path.display().to_string(), problem })?;
        self.files.push(WeightFile { path, file: Mutex::new(file) });
        Ok(entries)
    }

    fn add_entries(&mut self, entries: BTreeMap<String, Raw>) {
        for (name, raw) in entries {
            match raw {
                Raw::Known(source) => drop(self.tensors.insert(name, source)),
                Raw::Foreign(dtype) => drop(self.foreign.insert(name, dtype)),
            }
        }
    }

    /// Names of all tensors, sorted; those of unreadable types included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().chain(self.foreign.keys()).map(String::as_str)
    }

    /// The tensor, or an error that says it is missing or of a type not read here.
    pub fn tensor(&self, name: &str) -> Result<&Source> {
        self.tensors.get(name).ok_or_else(|| LoadError::Tensor {
            tensor: name.to_owned(),
            problem: match self.foreign.get(name) {
                Some(dtype) => format!("type {dtype} is not read (F32, F16 and BF16 are)"),
                None => format!("the config needs it, {} does not have it", self.dir.display()),
            },
        })
    }

    /// Fills `out` with the tensor's bytes from `offset`; the range must lie in the tensor.
    pub fn read(&self, source: &Source, offset: u64, out: &mut [u8]) -> Result<()> {
        let weights = &self.files[source.file];
        let io = io_error(&weights.path);
        let mut file = weights.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(source.start + offset)).map_err(&io)?;
        file.read_exact(out).map_err(io)
    }

    /// A file beside the config, such as `tokenizer.json`; `None` if it is not there.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join(name);
        if path.exists() { read_bounded(&path, JSON_BYTES_MAX).map(Some) } else { Ok(None) }
    }
}

enum Raw {
    Known(Source),
    Foreign(String),
}

/// Reads and checks a header against the file's size.
fn read_header(
    file: &mut File,
    size: u64,
    index: usize,
) -> std::result::Result<BTreeMap<String, Raw>, String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| format!("truncated: only {size} bytes"))?;
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
        let raw = check_entry(entry, data, size - data, index)
            .map_err(|problem| format!("tensor {name}: {problem}"))?;
        entries.insert(name, raw);
    }
    Ok(entries)
}

fn check_entry(
    entry: Entry,
    data: u64,
    data_size: u64,
    file: usize,
) -> std::result::Result<Raw, String> {
    let (start, end) = entry.data_offsets;
    if start > end {
        return Err(format!("its offsets {start}..{end} are reversed"));
    }
    if end > data_size {
        return Err(format!(
            "truncated: it ends at byte {end} of the data, and the file has {data_size}"
        ));
    }
    let dtype = match entry.dtype.as_str() {
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::Bf16,
        other => return Ok(Raw::Foreign(other.to_owned())),
    };
    let elements = entry.shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim));
    let bytes = elements.and_then(|n| n.checked_mul(dtype.block_bytes() as u64));
    if bytes != Some(end - start) {
        return Err(format!(
            "{} bytes, but {dtype} of shape {:?} takes {}",
            end - start,
            entry.shape,
            bytes.map_or("more than fits".into(), |b| b.to_string()),
        ));
    }
    Ok(Raw::Known(Source {
        file,
        start: data + start,
        size: end - start,
        dtype,
        shape: entry.shape,
    }))
}

/// A file name that stays in its directory.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
        && !name.contains(['\\', '\0', ':'])
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = io_error(path);
    let mut bytes = Vec::new();
    File::open(path).map_err(&io)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(LoadError::File {
            file: path.display().to_string(),
            problem: format!("more than {limit} bytes"),
        });
    }
    Ok(bytes)
}

fn read_json(path: &Path, limit: u64) -> Result<Value> {
    let bytes = read_bounded(path, limit)?;
    serde_json::from_slice(&bytes).map_err(|e| LoadError::File {
        file: path.display().to_string(),
        problem: format!("not valid JSON: {e}"),
    })
}
