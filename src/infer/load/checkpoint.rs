//! What a model can be converted or run from, whatever container it comes in.
//!
//! Owns the seam: `convert` and `run` know [`Checkpoint`] and nothing behind it. A container
//! says how each tensor lies ([`Form`]); one whose blocks are no type of ours decodes them
//! itself and says into which type.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::hf::HuggingFace;
use super::rdrr::Rdrr;
use super::{LoadError, Result};
use doppler_store::{DType, Manifest, RangeReader};

/// How a tensor lies in its container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Rows of whole blocks of a type known here: what is read is what is stored.
    Blocks(DType),
    /// Anything else that the container decodes exactly: what is read has this type.
    Decoded {
        /// For people: "GPTQ, 4 bits in groups of 128".
        what: String,
        dtype: DType,
    },
    /// Known by name only; reading it is refused.
    Unreadable(String),
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Outermost dimension first; a row is the last one. Of what is read, not of how it is packed.
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

    /// The type in which rows are read; `None` if they are not.
    pub const fn dtype(&self) -> Option<DType> {
        match self.form {
            Form::Blocks(dtype) | Form::Decoded { dtype, .. } => Some(dtype),
            Form::Unreadable(_) => None,
        }
    }
}

/// A model's config, tokenizer and tensors, whose headers were checked when it was opened.
pub trait Checkpoint {
    /// Where it lies, for messages.
    fn place(&self) -> String;

    /// What the model is called: a directory's or a file's name, or what the file says.
    fn name(&self) -> String;

    /// Hugging Face's `config.json`, or what says the same.
    fn config(&self) -> &Value;

    /// Tokens that end a text.
    fn eos_token_ids(&self) -> Result<Vec<u32>>;

    /// `tokenizer.json`, or what says the same; `None` if it comes without.
    fn tokenizer(&self) -> Result<Option<Vec<u8>>>;

    /// Names of all tensors, sorted; those that cannot be read included.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    fn find(&self, name: &str) -> Option<&Stored>;

    /// Fills `out` with whole rows of a tensor from row `first` on, in [`Stored::dtype`].
    /// The rows must lie in the tensor.
    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()>;

    /// The manifest, if this is a model as `convert` makes it. Its tensors are the graph's
    /// weights: their source recipes were carried out.
    fn manifest(&self) -> Option<&Manifest> {
        None
    }

    /// The shards of [`Self::manifest`], by content address.
    ///
    /// # Errors
    /// A container without such shards, or one whose shards have no content address.
    fn shards(&self) -> Result<Arc<dyn RangeReader>> {
        let problem = "its tensors do not lie in shards".to_owned();
        Err(LoadError::File { file: self.place(), problem })
    }
}

/// Opens whatever model lies at `path`.
///
/// # Errors
/// A directory that holds none of the known containers, or one that is damaged.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>> {
    let fail = |problem: &str| {
        Err(LoadError::File { file: path.display().to_string(), problem: problem.to_owned() })
    };
    if !path.exists() {
        return fail("there is no such directory");
    }
    if path.join("manifest.json").is_file() {
        return Ok(Box::new(Rdrr::open(path)?));
    }
    if path.join("config.json").is_file() {
        return Ok(Box::new(HuggingFace::open(path)?));
    }
    fail("no model: it has neither manifest.json (RDRR) nor config.json (Hugging Face)")
}
