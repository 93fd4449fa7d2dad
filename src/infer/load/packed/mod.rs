//! A Hugging Face directory whose matrices are stored quantised: several tensors make one.
//!
//! Owns telling the methods apart, and the matrices as they are read: `MODULE.weight` in place of
//! `MODULE.qweight`, `MODULE.scales` and so on. Each method has a file (`awq`, `compressed`,
//! `fp8`, `gptq`, `mlx`, `mxfp4`); it finds its matrices and checks all shapes and types before
//! anything is allocated. Integer levels stay integers in Q8_0 or Q4_1 where these hold them
//! exactly (`affine`), and MXFP4 is MXFP4; anything else is computed in F32. Refuses other methods by name. Invariant:
//! reading rounds no weight to fewer bits than F32 has.

mod affine;
mod awq;
mod compressed;
mod float;
mod fp8;
mod gptq;
mod mlx;
mod mxfp4;
mod parts;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use self::parts::Parts;
use super::checkpoint::{Checkpoint, Form, Stored};
use super::files::Files;
use super::hf::HuggingFace;
use super::{LoadError, Result, missing, stacks};
use crate::graph::Weight;
use crate::source::Source;
use doppler_store::chat::ChatTemplates;

/// The keys of a config under which a quantisation is described. MLX writes the second, or both.
const KEYS: [&str; 2] = ["quantization_config", "quantization"];

/// How the rows of one matrix are computed.
trait Matrix: Send + Sync {
    /// Fills whole rows in the type that the matrix has in [`Found::add`].
    fn read(&self, parts: &Parts<'_>, first: u64, out: &mut [u8]) -> Result<()>;
}

/// A method's matrices.
#[derive(Default)]
struct Found {
    matrices: BTreeMap<String, (Stored, Box<dyn Matrix>)>,
    /// The stored tensors that these are made of, or that say nothing about weights.
    used: BTreeSet<String>,
    /// By matrix, the stored tensors that it is made of.
    parts: BTreeMap<String, Vec<String>>,
}

impl Found {
    /// Adds the matrix `name`, made of the tensors `from`.
    fn add(
        &mut self,
        name: String,
        stored: Stored,
        from: impl IntoIterator<Item = String>,
        matrix: impl Matrix + 'static,
    ) {
        let from: Vec<String> = from.into_iter().collect();
        self.used.extend(from.iter().cloned());
        self.parts.insert(name.clone(), from);
        self.matrices.insert(name, (stored, Box::new(matrix)));
    }
}

/// An opened directory with packed matrices.
struct Packed {
    files: HuggingFace,
    /// `config.json` without its quantisation.
    config: Value,
    /// What the quantisation is called.
    method: String,
    matrices: BTreeMap<String, (Stored, Box<dyn Matrix>)>,
    parts: BTreeMap<String, Vec<String>>,
    /// The sorted names of everything that can be read.
    names: Vec<String>,
    cache: parts::Cache,
}

/// Opens a Hugging Face directory, packed or not.
///
/// # Errors
/// If it is damaged, or its weights are quantised in a way that is not understood.
pub fn open(dir: &Path, opener: Arc<dyn Files>) -> Result<Box<dyn Checkpoint>> {
    let files = HuggingFace::open(dir, opener)?;
    let described: Vec<(&str, &Value)> = KEYS
        .into_iter()
        .filter_map(|key| files.config().get(key).map(|value| (key, value)))
        .filter(|(_, value)| !value.is_null())
        .collect();
    let Some(&(key, first)) = described.first() else { return Ok(Box::new(files)) };
    let fail = |problem: String| LoadError::File {
        file: dir.join("config.json").display().to_string(),
        problem: format!("{key}: {problem}"),
    };
    if let Some((other, _)) = described.iter().find(|(_, value)| *value != first) {
        return Err(fail(format!("it says something else than {other}")));
    }
    let (method, found) = find(first, &files, &fail)?;
    let mut config = files.config().clone();
    if let Some(map) = config.as_object_mut() {
        KEYS.iter().for_each(|key| drop(map.remove(*key)));
    }
    let Found { matrices, used, parts } = found;
    let plain = files.names().filter(|name| !used.contains(*name)).map(str::to_owned);
    let mut names: Vec<String> = plain.chain(matrices.keys().cloned()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let problem = "it is stored both packed and plain".to_owned();
        return Err(LoadError::Tensor { tensor: twice[0].clone(), problem });
    }
    let cache = parts::Cache::default();
    let packed = Packed { files, config, method, matrices, parts, names, cache };
    packed.refuse_leftovers()?;
    Ok(Box::new(packed))
}

/// The method's name and its matrices.
fn find(
    described: &Value,
    files: &HuggingFace,
    fail: &dyn Fn(String) -> LoadError,
) -> Result<(String, Found)> {
    let method = match described.get("quant_method") {
        Some(method) => method.as_str().ok_or_else(|| fail(format!("quant_method is {method}")))?,
        None if described.get("bits").is_some() && described.get("group_size").is_some() => "mlx",
        None => return Err(fail("it has neither quant_method nor bits and group_size".into())),
    };
    let config = Described { value: described, fail };
    match method {
        "awq" => awq::find(&config, files),
        "compressed-tensors" => compressed::find(&config, files),
        "fp8" => fp8::find(&config, files),
        "gptq" => gptq::find(&config, files),
        "mlx" => mlx::find(&config, files),
        "mxfp4" => mxfp4::find(files),
        other => Err(fail(format!(
            "quant_method {other:?} cannot be read (awq, compressed-tensors, fp8, gptq, mxfp4 and \
             MLX's can); convert the original checkpoint"
        ))),
    }
}

/// What a config says about a quantisation.
struct Described<'a> {
    value: &'a Value,
    fail: &'a dyn Fn(String) -> LoadError,
}

impl Described<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn fail(&self, problem: String) -> LoadError {
        (self.fail)(problem)
    }

    /// Refuses a key unless it is absent or has one of these values.
    fn only(&self, key: &str, supported: &[Value]) -> Result<()> {
        match self.get(key).filter(|value| !supported.contains(value)) {
            None => Ok(()),
            Some(value) => {
                let list: Vec<String> = supported.iter().map(Value::to_string).collect();
                Err(self.fail(format!("{key} {value} cannot be read ({} can)", list.join(", "))))
            }
        }
    }

    /// A whole number, by any of several names.
    fn number(&self, keys: &[&str]) -> Result<i64> {
        let value = keys.iter().find_map(|key| self.get(key));
        let value = value.ok_or_else(|| self.fail(format!("{} is missing", keys[0])))?;
        value.as_i64().ok_or_else(|| self.fail(format!("{} is {value}", keys[0])))
    }

    /// The columns that share a scale. `None` means all columns (-1).
    fn group_size(&self, keys: &[&str]) -> Result<Option<u64>> {
        match self.number(keys)? {
            -1 => Ok(None),
            size => u64::try_from(size)
                .ok()
                .filter(|size| (1..=1 << 20).contains(size))
                .map(Some)
                .ok_or_else(|| self.fail(format!("{} is {size}", keys[0]))),
        }
    }
}

/// The error for a tensor of a packed matrix.
fn wrong(tensor: &str, problem: impl Into<String>) -> LoadError {
    LoadError::Tensor { tensor: tensor.to_owned(), problem: problem.into() }
}

impl Packed {
    /// A packed tensor that belongs to no matrix: something beside it is missing.
    fn refuse_leftovers(&self) -> Result<()> {
        let packed = |name: &&String| match self.files.find(name).map(|stored| &stored.form) {
            Some(Form::Unreadable(what)) => {
                ["F8_E4M3", "F8_E5M2", "I32", "U32", "U8", "I8"].contains(&what.as_str())
            }
            _ => false,
        };
        let left =
            self.names.iter().find(|name| !self.matrices.contains_key(*name) && packed(name));
        match left {
            None => Ok(()),
            Some(name) => Err(wrong(
                name,
                format!("it is packed, and what {} needs beside it is missing", self.method),
            )),
        }
    }
}

impl Checkpoint for Packed {
    fn place(&self) -> String {
        self.files.place()
    }

    fn name(&self) -> String {
        self.files.name()
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn quantization(&self) -> Option<String> {
        Some(self.method.clone())
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        self.files.eos_token_ids()
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        self.files.tokenizer()
    }

    fn chat_templates(&self) -> Result<Option<ChatTemplates>> {
        self.files.chat_templates()
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.names.iter().map(String::as_str))
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        match self.matrices.get(name) {
            Some((stored, _)) => Some(stored),
            None if self.names.binary_search_by(|own| own.as_str().cmp(name)).is_ok() => {
                self.files.find(name)
            }
            None => None,
        }
    }

    fn source<'a>(&self, weight: &'a Weight) -> Cow<'a, Source> {
        stacks::source(self, weight)
    }

    /// Parts may belong to several matrices, so they are expected, but never released.
    fn expect(&self, names: &[&str]) {
        let mut stored: Vec<&str> = Vec::new();
        for name in names {
            match self.parts.get(*name) {
                Some(parts) => stored.extend(parts.iter().map(String::as_str)),
                None => stored.push(name),
            }
        }
        self.files.expect(&stored);
    }

    fn release(&self, name: &str) {
        if !self.parts.contains_key(name) {
            self.files.release(name);
        }
    }

    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        if let Some((_, matrix)) = self.matrices.get(name) {
            return matrix.read(&Parts::new(&self.files, &self.cache), first, out);
        }
        match self.find(name) {
            Some(_) => self.files.read(name, first, out),
            None => Err(missing(self, name)),
        }
    }
}
