//! Model families: each file turns a checkpoint's config into the op list.
//!
//! Reads Hugging Face's `config.json`, in the old form (`rope_theta` beside
//! `rope_scaling`) and the new one (`rope_parameters`). Whatever would change
//! the model's output and is not understood is refused by name, never ignored.
//! Tensor names in the graph are Hugging Face's.

mod block;
mod config;
mod llama;
mod mixtral;
mod qwen3;
mod qwen3_moe;
mod rope;

use super::graph::{Activation, Graph};
pub use config::{COUNT_MAX, FamilyError};
pub use rope::{RopeScaling, RopeSpec};

/// The experts of a mixture-of-experts model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeSpec {
    /// Experts in each sparse layer.
    pub experts: usize,
    /// Experts a token visits in each sparse layer, `1..=experts`.
    pub top_k: usize,
    /// An expert's inner width.
    pub ff: usize,
    /// Whether the chosen experts' probabilities are scaled to sum to 1.
    pub renormalise: bool,
    /// One entry a layer: sparse (experts) or dense (a plain feed-forward of `Spec::ff`).
    pub sparse: Vec<bool>,
}

/// What a checkpoint's config says about its shape, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The family's name: `llama`, `qwen3`, `mixtral` or `qwen3_moe`.
    pub family: &'static str,
    pub layers: usize,
    pub hidden: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    /// Inner width of a dense feed-forward.
    pub ff: usize,
    pub vocab: usize,
    pub rms_eps: f32,
    pub rope: RopeSpec,
    /// The output matrix is the embedding table.
    pub tie_word_embeddings: bool,
    /// `max_position_embeddings`, tokens.
    pub context_max: usize,
    pub activation: Activation,
    /// q, k, v and o projections carry a bias.
    pub attention_bias: bool,
    /// The dense feed-forward's three projections carry a bias.
    pub mlp_bias: bool,
    /// Queries and keys are normalised head by head before they are turned.
    pub qk_norm: bool,
    /// One entry a layer: the positions a token sees, itself included; `None` is all of them.
    pub windows: Vec<Option<usize>>,
    /// `None` for a dense model.
    pub moe: Option<MoeSpec>,
}

impl Spec {
    /// Experts a single token visits over the whole model.
    pub fn experts_per_token(&self) -> usize {
        self.moe
            .as_ref()
            .map_or(0, |moe| moe.top_k * moe.sparse.iter().filter(|sparse| **sparse).count())
    }
}

/// A family: what it is called, which architectures it reads, and how.
struct Family {
    name: &'static str,
    /// Values of `architectures[0]`.
    architectures: &'static [&'static str],
    /// Values of `model_type`, asked when `architectures` is absent.
    model_types: &'static [&'static str],
    spec: fn(&config::Config<'_>) -> Result<Spec, FamilyError>,
    graph: fn(&Spec) -> Graph,
}

const FAMILIES: [Family; 4] = [llama::FAMILY, qwen3::FAMILY, mixtral::FAMILY, qwen3_moe::FAMILY];

/// The architectures that can be run, as `architectures` spells them.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|family| family.architectures.iter().copied()).collect()
}

/// Reads a checkpoint's `config.json`.
///
/// # Errors
/// One line naming the architecture or the key that is missing, out of bounds or not supported.
pub fn from_config(config: &serde_json::Value) -> Result<Spec, FamilyError> {
    let config = config::Config::new(config)?;
    let name = config.architecture()?;
    let family = FAMILIES
        .iter()
        .find(|f| f.architectures.contains(&name) || f.model_types.contains(&name))
        .ok_or_else(|| FamilyError::UnknownArchitecture {
            name: name.to_owned(),
            known: known().join(", "),
        })?;
    (family.spec)(&config)
}

/// The op list of one step of this model.
///
/// # Panics
/// If `spec` was not made by [`from_config`] (its family is unknown).
pub fn graph(spec: &Spec) -> Graph {
    let family = FAMILIES.iter().find(|f| f.name == spec.family).expect("a spec names its family");
    (family.graph)(spec)
}

#[cfg(test)]
mod tests;
