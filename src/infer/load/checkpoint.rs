//! The interface of everything that a model can be converted or run from, whatever its container.
//!
//! `convert` and `run` know [`Checkpoint`] and nothing behind it. A container says how each tensor
//! is stored ([`Form`]). If its blocks are not one of our types, it decodes them itself and says
//! into which type.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::files::{Files, OnDisk};
use super::gguf::Gguf;
use super::packed;
use super::rdrr::Rdrr;
use super::{LoadError, Result};
use crate::graph::Weight;
use crate::source::Source;
use doppler_store::chat::ChatTemplates;
use doppler_store::{DType, Manifest, RangeReader};

/// How a tensor is stored in its container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Rows of whole blocks of a type known here, which are read as stored.
    Blocks(DType),
    /// Anything else that the container decodes exactly. The rows that are read have this type.
    Decoded {
        /// For people: "GPTQ, 4 bits in groups of 128".
        what: String,
        dtype: DType,
    },
    /// Only its name is known; reading it is refused.
    Unreadable(String),
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Outermost dimension first; the last one is a row. This is the shape that is read, not how it
    /// is packed.
    pub shape: Vec<u64>,
    pub form: Form,
}

impl Stored {
    /// As a matrix: (product of all but the last dimension, last dimension).
    pub fn rows_cols(&self) -> (u64, u64) {
        match self.shape.split_last() {
            None => (1, 1),
            Some((&cols, rows)) => (rows.iter().product(), cols),
        }
    }

    /// The type in which rows are read. `None` if they cannot be read.
    pub const fn dtype(&self) -> Option<DType> {
        match self.form {
            Form::Blocks(dtype) | Form::Decoded { dtype, .. } => Some(dtype),
            Form::Unreadable(_) => None,
        }
    }
}

/// A model's config, tokenizer and tensors. Headers were checked when it was opened.
pub trait Checkpoint {
    /// Where it is, for messages.
    fn place(&self) -> String;

    /// The model's name: that of the directory or the file, or a name that the file contains.
    fn name(&self) -> String;

    /// Hugging Face's `config.json`, or an equivalent.
    fn config(&self) -> &Value;

    /// What the form of its weights is called, if they are quantised already.
    fn quantization(&self) -> Option<String> {
        None
    }

    /// Tokens that end a text.
    fn eos_token_ids(&self) -> Result<Vec<u32>>;

    /// `tokenizer.json`, or an equivalent. `None` if there is none.
    fn tokenizer(&self) -> Result<Option<Vec<u8>>>;

    /// The templates that turn a conversation into a prompt. `None` if there are none.
    fn chat_templates(&self) -> Result<Option<ChatTemplates>> {
        Ok(None)
    }

    /// The sorted names of all tensors, including those that cannot be read.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    fn find(&self, name: &str) -> Option<&Stored>;

    /// How a weight of the graph is made from this container's tensors. As the family says, unless
    /// the container has other names or layouts.
    fn source<'a>(&self, weight: &'a Weight) -> Cow<'a, Source> {
        Cow::Borrowed(&weight.source)
    }

    /// Fills `out` with whole rows of a tensor, from row `first` on, in [`Stored::dtype`]. The
    /// tensor must have these rows.
    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()>;

    /// Each of these tensors will be read, in this order, and then released.
    fn expect(&self, _names: &[&str]) {}

    /// A tensor is not needed any more: what was made of it is durable.
    fn release(&self, _name: &str) {}

    /// The manifest, if this model was made by `convert`. Its tensors are the graph's weights:
    /// their source recipes have been carried out.
    fn manifest(&self) -> Option<&Manifest> {
        None
    }

    /// The shards of [`Self::manifest`], by content address.
    ///
    /// # Errors
    /// If the container has no such shards, or the shards have no content address.
    fn shards(&self) -> Result<Arc<dyn RangeReader>> {
        let problem = "its tensors are not in shards".to_owned();
        Err(LoadError::File { file: self.place(), problem })
    }
}

/// Tensors of one type of a container that are held as another type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The container's type.
    pub what: String,
    pub dtype: DType,
    pub tensors: usize,
}

/// The tensors that a container decodes, by type.
pub fn restored(checkpoint: &dyn Checkpoint) -> Vec<Restored> {
    let mut found: Vec<Restored> = Vec::new();
    for stored in checkpoint.names().filter_map(|name| checkpoint.find(name)) {
        let Form::Decoded { what, dtype } = &stored.form else { continue };
        match found.iter_mut().find(|one| one.what == *what && one.dtype == *dtype) {
            Some(one) => one.tensors += 1,
            None => found.push(Restored { what: what.clone(), dtype: *dtype, tensors: 1 }),
        }
    }
    found
}

/// Opens the model at `path`, whatever its container.
///
/// # Errors
/// If there is none of the known containers, or it is damaged.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>> {
    open_with(path, Arc::new(OnDisk))
}

/// As [`open`], with weight files that are read through `files`.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: &Path, files: Arc<dyn Files>) -> Result<Box<dyn Checkpoint>> {
    let fail = |problem: &str| {
        Err(LoadError::File { file: path.display().to_string(), problem: problem.to_owned() })
    };
    if !path.exists() {
        return fail("there is no such file or directory");
    }
    if path.is_file() {
        return match path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
            true => Ok(Box::new(Gguf::open(path, files)?)),
            false => fail("not a model: of single files only *.gguf are read"),
        };
    }
    if path.join("manifest.json").is_file() {
        return Ok(Box::new(Rdrr::open(path)?));
    }
    if path.join("config.json").is_file() {
        return packed::open(path, files);
    }
    if path.join("adapter_config.json").is_file() {
        return fail("an adapter of PEFT, not a model: give it with --adapter");
    }
    fail(
        "not a model: it has neither manifest.json (RDRR) nor config.json (Hugging Face); a GGUF file is \
         given by its own name",
    )
}
