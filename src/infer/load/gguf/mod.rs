//! A GGUF file, or one in several parts, as a checkpoint.
//!
//! Owns reading the header (`header`), ggml's types (`types`, `blocks`), the config (`keys`,
//! `config`), where a graph's weights are (`names`), the vocabulary (`vocabulary`, `words`) and the
//! chat templates (`chat`).
//! Refuses by name what it does not understand, when the file is opened. No file is mapped: a read
//! copies. Invariant: reading rounds no weight.

mod adapter;
mod blocks;
mod chat;
mod config;
mod derived;
pub mod header;
pub mod inspect;
mod keys;
mod names;
#[cfg(test)]
mod tests;
mod types;
mod vocabulary;
pub mod words;
pub mod write;
#[cfg(test)]
mod written_tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

pub(crate) use self::adapter::{AdapterFile, open_adapter};
use self::config::{Architecture, Facts};
use self::header::{Header, TensorInfo, Value};
use self::keys::Keys;
use self::types::Held;
use self::vocabulary::Vocabulary;
use super::checkpoint::{Checkpoint, Form, Stored};
use super::files::{Files, FromStart, ReadAt, Stretch};
use super::{LoadError, Result, io_error, missing};
use crate::graph::Weight;
use crate::source::Source;
use doppler_store::chat::ChatTemplates;

/// The most parts of one model.
const PARTS_MAX: u64 = 1024;
/// What the frequencies of a rope are divided by. The config contains it.
const DIVISORS: &str = "rope_freqs.weight";

struct Part {
    path: PathBuf,
    file: Box<dyn ReadAt>,
}

/// A tensor: the part that has it, its place there, and how it is read.
struct Tensor {
    part: usize,
    info: TensorInfo,
    stored: Stored,
}

/// An opened file whose header was checked.
pub struct Gguf {
    path: PathBuf,
    opener: Arc<dyn Files>,
    metadata: BTreeMap<String, Value>,
    architecture: &'static Architecture,
    head_dim: u64,
    config: Json,
    parts: Vec<Part>,
    tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Opens a file. Of a model in several parts this is the first; the others lie beside it.
    ///
    /// # Errors
    /// One line that names the file and what is wrong with it.
    pub fn open(path: &Path, opener: Arc<dyn Files>) -> Result<Self> {
        let (part, header) = open_part(path, &*opener)?;
        let fail = |problem: String| LoadError::File { file: path.display().to_string(), problem };
        let mut parts = vec![(part, header.tensors)];
        let metadata = header.metadata;
        if adapter::is(&metadata) {
            return Err(fail("an adapter, not a model: give it with --adapter".into()));
        }
        for path in other_parts(path, &metadata).map_err(fail)? {
            let (part, header) = open_part(&path, &*opener)?;
            let problem = unlike(&metadata, &header.metadata, parts.len());
            if let Some(problem) = problem {
                return Err(LoadError::File { file: path.display().to_string(), problem });
            }
            parts.push((part, header.tensors));
        }
        let mut tensors = BTreeMap::new();
        for (number, (_, listed)) in parts.iter_mut().enumerate() {
            for (name, info) in std::mem::take(listed) {
                if tensors.contains_key(&name) {
                    return Err(fail(format!("tensor {name:?} is in two parts")));
                }
                let stored = Stored { shape: info.shape.clone(), form: form(&info) };
                tensors.insert(name, Tensor { part: number, info, stored });
            }
        }
        if let Some(Value::Integer(total)) = metadata.get("split.tensors.count")
            && *total != tensors.len() as i128
        {
            return Err(fail(format!("its parts have {} tensors of {total}", tensors.len())));
        }
        let parts = parts.into_iter().map(|(part, _)| part).collect();
        let architecture =
            config::architecture(metadata.get("general.architecture")).map_err(fail)?;
        let mut opened = Self {
            path: path.to_owned(),
            opener,
            metadata,
            architecture,
            head_dim: 0,
            config: Json::Null,
            parts,
            tensors,
        };
        opened.configure()?;
        Ok(opened)
    }

    /// Makes the config from metadata and tensors.
    fn configure(&mut self) -> Result<()> {
        let divisors = self.divisors()?;
        let fail = |problem: String| LoadError::File { file: self.place(), problem };
        let Some(table) = self.tensors.get("token_embd.weight") else {
            return Err(missing(self, "token_embd.weight"));
        };
        let facts = Facts {
            vocab: table.stored.rows_cols().0,
            tied: !self.tensors.contains_key("output.weight"),
            biased: self.tensors.contains_key("blk.0.attn_q.bias"),
            normed: self.tensors.contains_key("blk.0.attn_q_norm.weight"),
            divisors,
        };
        let keys = Keys::new(&self.metadata, self.architecture.name);
        let head_dim = config::head_dim(&keys).map_err(fail)?;
        let mut config = config::config(self.architecture, &keys, &facts).map_err(fail)?;
        // What people look for in a config. The tokenizer says the same.
        if let Some(vocabulary) = Vocabulary::new(&self.metadata, facts.vocab).map_err(fail)? {
            let ends = vocabulary.ends().map_err(fail)?;
            config["eos_token_id"] = ends.into();
        }
        (self.head_dim, self.config) = (head_dim, config);
        self.tensors.remove(DIVISORS);
        Ok(())
    }

    fn divisors(&self) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.tensors.get(DIVISORS) else { return Ok(None) };
        let fail = |problem: &str| LoadError::Tensor {
            tensor: DIVISORS.to_owned(),
            problem: problem.to_owned(),
        };
        let dtype = tensor.stored.dtype();
        let (rows, cols) = tensor.stored.rows_cols();
        if dtype != Some(doppler_store::DType::F32) || rows != 1 || cols > 1 << 16 {
            return Err(fail("expected a list of F32"));
        }
        let mut bytes = vec![0; 4 * cols as usize];
        self.read(DIVISORS, 0, &mut bytes)?;
        let values: Vec<f32> =
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        match values.iter().all(|value| value.is_finite() && *value > 0.0) {
            true => Ok(Some(values)),
            false => Err(fail("it has a value that is not a number above 0")),
        }
    }

    fn vocabulary(&self) -> Result<Option<Vocabulary<'_>>> {
        let rows = self.config.get("vocab_size").and_then(Json::as_u64).unwrap_or(0);
        Vocabulary::new(&self.metadata, rows).map_err(|problem| self.fail(problem))
    }

    fn fail(&self, problem: String) -> LoadError {
        LoadError::File { file: self.place(), problem }
    }

    /// The bytes of some rows as the file has them.
    fn raw(&self, tensor: &Tensor, first: u64, out: &mut [u8]) -> Result<()> {
        let part = &self.parts[tensor.part];
        let start = tensor.info.start + first * raw_row_bytes(&tensor.info);
        part.file.read_at(start, out).map_err(io_error(&part.path))
    }

    /// Where a tensor's bytes are.
    fn stretch(&self, name: &str) -> Option<Stretch<'_>> {
        let tensor = self.tensors.get(name)?;
        let path = &self.parts[tensor.part].path;
        let bytes = tensor.stored.rows_cols().0 * raw_row_bytes(&tensor.info);
        Some(Stretch { path, start: tensor.info.start, bytes })
    }
}

/// A vocabulary of the kind "llama" as a `tokenizer.json`.
///
/// # Errors
/// As for a file with this metadata.
pub(super) fn sentence_piece(
    metadata: &BTreeMap<String, Value>,
) -> std::result::Result<Vec<u8>, String> {
    let tokens = match metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Strings(tokens)) => tokens.len() as u64,
        _ => 0,
    };
    let vocabulary = Vocabulary::new(metadata, tokens)?.ok_or("it has no tokens")?;
    vocabulary.tokenizer()
}

/// How a weight is made from the tensors of a file of this architecture, in heads of `head_dim`.
///
/// # Errors
/// If the architecture is unknown.
pub(crate) fn source(
    architecture: &str,
    head_dim: u64,
    weight: &Weight,
) -> std::result::Result<Source, String> {
    let of = config::architecture(Some(&Value::String(architecture.to_owned())))?;
    Ok(names::source(of, head_dim, weight))
}

/// Reads everything but weights from a file's bytes: header, config, vocabulary. Returns the config.
/// For tests and fuzzing.
///
/// # Errors
/// As [`Gguf::open`], without the file's name.
pub fn probe(bytes: &[u8]) -> std::result::Result<Json, String> {
    let Header { metadata, tensors } = header::read(bytes, bytes.len() as u64)?;
    let architecture = config::architecture(metadata.get("general.architecture"))?;
    let table = tensors.get("token_embd.weight").ok_or("token_embd.weight is missing")?;
    let facts = Facts {
        vocab: table.shape.iter().rev().skip(1).product(),
        tied: !tensors.contains_key("output.weight"),
        biased: tensors.contains_key("blk.0.attn_q.bias"),
        normed: tensors.contains_key("blk.0.attn_q_norm.weight"),
        divisors: None,
    };
    let config = config::config(architecture, &Keys::new(&metadata, architecture.name), &facts)?;
    if let Some(vocabulary) = Vocabulary::new(&metadata, facts.vocab)? {
        vocabulary.ends()?;
        vocabulary.tokenizer()?;
    }
    Ok(config)
}

/// How a tensor is read.
fn form(info: &TensorInfo) -> Form {
    match info.ggml.held() {
        Held::Same(dtype) => Form::Blocks(dtype),
        Held::As(dtype, _) => Form::Decoded { what: info.ggml.to_string(), dtype },
    }
}

fn raw_row_bytes(info: &TensorInfo) -> u64 {
    let (len, bytes) = info.ggml.block();
    info.shape.last().map_or(0, |cols| cols / len * bytes)
}

fn open_part(path: &Path, files: &dyn Files) -> Result<(Part, Header)> {
    let file = files.open(path).map_err(io_error(path))?;
    let header = header::read(BufReader::new(FromStart::new(&*file)), file.size())
        .map_err(|problem| LoadError::File { file: path.display().to_string(), problem })?;
    Ok((Part { path: path.to_owned(), file }, header))
}

/// The paths of the parts after the first: `NAME-00002-of-00003.gguf` and so on.
fn other_parts(
    first: &Path,
    metadata: &BTreeMap<String, Value>,
) -> std::result::Result<Vec<PathBuf>, String> {
    let number = |key: &str| match metadata.get(key) {
        None => Ok(None),
        Some(Value::Integer(value)) => {
            let value = u64::try_from(*value).ok().filter(|value| *value <= PARTS_MAX);
            value.map(Some).ok_or_else(|| format!("{key} is out of range (at most {PARTS_MAX})"))
        }
        Some(other) => Err(format!("{key} is {}, expected a number", other.kind())),
    };
    let count = number("split.count")?.unwrap_or(1);
    let here = number("split.no")?.unwrap_or(0);
    if count < 2 {
        return Ok(Vec::new());
    }
    let name = first.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(&format!("-{:05}-of-{count:05}.gguf", here + 1));
    let part = |stem: &str, number: u64| format!("{stem}-{number:05}-of-{count:05}.gguf");
    let Some(stem) = stem else {
        let wanted = part("NAME", here + 1);
        return Err(format!("part {} of {count} must be called {wanted}", here + 1));
    };
    if here != 0 {
        return Err(format!("part {} of {count}; open the first: {}", here + 1, part(stem, 1)));
    }
    Ok((2..=count).map(|number| first.with_file_name(part(stem, number))).collect())
}

/// Why a file is not part `number` (from 0) of the model with this metadata.
fn unlike(
    first: &BTreeMap<String, Value>,
    other: &BTreeMap<String, Value>,
    number: usize,
) -> Option<String> {
    let count = first.get("split.count");
    let right = other.get("split.count") == count
        && other.get("split.no") == Some(&Value::Integer(number as i128));
    (!right)
        .then(|| format!("not part {} of its model: split.no or split.count differs", number + 1))
}

impl Checkpoint for Gguf {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    /// The file's name without its ending and the number of its part.
    fn name(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let whole = stem.rsplit_once("-of-").and_then(|(first, count)| {
            let (name, number) = first.rsplit_once('-')?;
            let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            (digits(number) && digits(count)).then(|| name.to_owned())
        });
        whole.unwrap_or(stem)
    }

    fn config(&self) -> &Json {
        &self.config
    }

    fn quantization(&self) -> Option<String> {
        let quantised = |form: &Form| match form {
            Form::Blocks(dtype) => dtype.is_quantised(),
            _ => true,
        };
        let any = self.tensors.values().any(|tensor| quantised(&tensor.stored.form));
        any.then(|| types::file_type(self.metadata.get("general.file_type")).to_owned())
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let Some(vocabulary) = self.vocabulary()? else { return Ok(Vec::new()) };
        vocabulary.ends().map_err(|problem| self.fail(problem))
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        let Some(vocabulary) = self.vocabulary()? else { return Ok(None) };
        vocabulary.tokenizer().map(Some).map_err(|problem| self.fail(problem))
    }

    fn chat_templates(&self) -> Result<Option<ChatTemplates>> {
        chat::templates(&self.metadata).map_err(|problem| self.fail(problem))
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name).map(|tensor| &tensor.stored)
    }

    fn source<'a>(&self, weight: &'a Weight) -> Cow<'a, Source> {
        Cow::Owned(names::source(self.architecture, self.head_dim, weight))
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
        let Held::As(dtype, convert) = tensor.info.ggml.held() else {
            return self.raw(tensor, first, out);
        };
        let (len, block) = tensor.info.ggml.block();
        let cols = tensor.stored.rows_cols().1;
        let row = dtype.row_bytes(cols as usize);
        let mut raw = vec![0; out.len() / row * raw_row_bytes(&tensor.info) as usize];
        self.raw(tensor, first, &mut raw)?;
        let becomes = len as usize / dtype.block_len() * dtype.block_bytes();
        let blocks = raw.chunks_exact(block as usize).zip(out.chunks_exact_mut(becomes));
        for (number, (block, out)) in blocks.enumerate() {
            convert(block, out).map_err(|problem| LoadError::Tensor {
                tensor: name.to_owned(),
                problem: format!("row {}: {problem}", first + number as u64 * len / cols),
            })?;
        }
        Ok(())
    }
}
