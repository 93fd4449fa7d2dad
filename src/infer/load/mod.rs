//! From files to weights: checkpoints in, RDRR out, and back in.
//!
//! Owns the containers (`checkpoint`: `hf`, `packed`, `rdrr`, `gguf`), how their files are read (`files`), making weights from stored tensors (`recipe`),
//! choosing types (`mixture`), placing tensors (`layout`), writing shards (`convert`, `sink`,
//! `dir_sink`), models of random weights (`arch`, `synth`, `routing`) and summarising manifests
//! (`inspect`). Refuses by name whatever it does not understand, before a byte is written.
//! Invariant: an output directory appears complete or not at all.

mod arch;
mod chat;
mod checkpoint;
mod convert;
mod describe;
mod dir_sink;
pub mod files;
mod further;
pub(crate) mod gguf;
mod hf;
pub mod inspect;
mod layout;
mod mixture;
mod nested;
mod packed;
#[cfg(test)]
mod quality_tests;
mod rdrr;
mod recipe;
#[cfg(test)]
mod recipe_tests;
#[cfg(test)]
mod resume_tests;
mod routing;
mod sentence;
mod sentencepiece;
mod sink;
mod stacks;
mod synth;
#[cfg(test)]
mod tests;
mod tied;
mod tokenizer;

use super::families::FamilyError;
use super::quant::QuantizeError;
use doppler_store::ManifestError;

pub use arch::Arch;
pub use checkpoint::{Checkpoint, Form, Restored, Stored, open, open_with, restored};
pub use convert::{Progress, SHARD_BYTES_DEFAULT, convert};
pub use dir_sink::DirSink;
pub use gguf::inspect::{GgufSummary, inspect_gguf};
pub use gguf::probe as probe_gguf;
#[cfg(test)]
pub(crate) use gguf::write::{Meta, header_bytes};
pub use gguf::write::{Written, to_gguf};
pub(crate) use gguf::{AdapterFile, open_adapter as open_gguf_adapter, source as gguf_source};
pub(crate) use hf::{is_plain, open_safetensors, read_big_json, read_small_json, read_whole};
pub use hf::{probe_index, probe_safetensors};
pub use mixture::{Quantization, UnknownQuantization};
pub use routing::Routing;
pub use sink::{MemorySink, ShardSink};
pub use synth::{SynthOptions, random_blocks, synth, synth_manifest};

/// Why a checkpoint could not be converted or read. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// A file of the checkpoint is invalid.
    #[error("{file}: {problem}")]
    File { file: String, problem: String },
    #[error("tensor {tensor}: {problem}")]
    Tensor { tensor: String, problem: String },
    #[error("tensor {tensor}, row {row}: {source}")]
    Quantize { tensor: String, row: u64, source: QuantizeError },
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error("the output would not be a valid model: {0}")]
    Manifest(#[from] ManifestError),
    #[error("unknown architecture {name:?} (known: {known})")]
    UnknownArch { name: String, known: String },
    #[error("{layers} layers are out of range: choose 1 to {max}")]
    Layers { layers: usize, max: usize },
    #[error("{0} exists and is not an empty directory: choose another output")]
    OutputExists(String),
    #[error("routing {0:?}: give zipf:S or zipf:S,stick:P, S from 0 to 4, P from 0 to 0.95")]
    Routing(String),
    #[error("this model's routing cannot be skewed: {0}")]
    NoRouting(String),
    #[error("shards of {0} bytes are not possible: choose 4096 to 67108864, a multiple of 4096")]
    ShardBytes(u64),
}

pub type Result<T> = std::result::Result<T, LoadError>;

/// What a checkpoint's tensor or module is called in its text model. `None` if it belongs to a tower.
pub(crate) use nested::rename as text_model_name;

/// The error for a tensor that the graph reads but the checkpoint does not have.
fn missing(checkpoint: &dyn Checkpoint, name: &str) -> LoadError {
    let problem = format!("the config needs it, {} does not have it", checkpoint.place());
    LoadError::Tensor { tensor: name.to_owned(), problem }
}

fn io_error(path: &std::path::Path) -> impl Fn(std::io::Error) -> LoadError + use<> {
    let path = path.display().to_string();
    move |source| LoadError::Io { path: path.clone(), source }
}
