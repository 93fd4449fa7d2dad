//! Model families: each file turns a checkpoint's config into the op list.
//!
//! A family's file reads Hugging Face's `config.json` and calls the building blocks of `block`.
//! Only the list below knows all families. Both forms of rope keys are read: `rope_theta` with
//! `rope_scaling`, and `rope_parameters`. Whatever would change the model's output and is not
//! understood is refused by name, never ignored. Tensor names in the graph are Hugging Face's.

mod block;
mod config;
mod groups;
mod harmless;
mod rope;
mod sentence;
mod windows;

use super::graph::Graph;
use config::Config;
pub use config::{COUNT_MAX, FamilyError};
pub use rope::{RopeScaling, RopeSpec};
pub use sentence::{Dense, KEY as SENTENCE_KEY, Pooling, Spec};

/// Declares each family's module, and makes a list of them.
macro_rules! families {
    ($($name:ident,)+) => {
        $(mod $name;)+
        const FAMILIES: &[Family] = &[$($name::FAMILY),+];
    };
}

families! {
    bert,
    deepseek,
    ernie4_5_moe,
    gemma2,
    gemma3,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    minimax_m2,
    mixtral,
    nemotron,
    olmo3,
    olmoe,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
    smollm3,
    starcoder2,
}

/// A family: its name, the architectures that it reads, and its reader.
struct Family {
    name: &'static str,
    /// Values of `architectures[0]`.
    architectures: &'static [&'static str],
    /// Values of `model_type`, used if `architectures` is absent.
    model_types: &'static [&'static str],
    read: fn(&Config<'_>) -> Result<Described, FamilyError>,
}

/// A model as its config describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    pub graph: Graph,
    /// The parameters of each of the graph's ropes.
    pub ropes: Vec<RopeSpec>,
    /// How its states become embeddings. `None` for a model that makes text.
    pub embedding: Option<Spec>,
}

/// The architectures that can be run, as `architectures` spells them.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|family| family.architectures.iter().copied()).collect()
}

/// The names of the families.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.name)
}

/// Describes the model of a checkpoint's `config.json`: the op list of one step.
///
/// # Errors
/// One line that names the architecture, or the key that is missing, out of bounds, not supported,
/// or neither read by the family nor known to be harmless.
pub fn read(config: &serde_json::Value) -> Result<Described, FamilyError> {
    let (family, config) = family(config)?;
    let embedding = sentence::spec(&config, config.architecture()?)?;
    let mut described = (family.read)(&config)?;
    config.all_read()?;
    if let Some(spec) = &embedding {
        sentence::apply(&mut described.graph, spec);
    }
    Ok(Described { embedding, ..described })
}

/// The name of the family that reads this config: `llama`, `qwen3_moe` and so on.
///
/// # Errors
/// If the architecture is missing or unknown.
pub fn name(config: &serde_json::Value) -> Result<&'static str, FamilyError> {
    Ok(family(config)?.0.name)
}

fn family(config: &serde_json::Value) -> Result<(&'static Family, Config<'_>), FamilyError> {
    let name = Config::new(config, "")?.architecture()?;
    let family = FAMILIES
        .iter()
        .find(|f| f.architectures.contains(&name) || f.model_types.contains(&name))
        .ok_or_else(|| FamilyError::UnknownArchitecture {
            name: name.to_owned(),
            known: known().join(", "),
        })?;
    let config = Config::new(config, family.name)?;
    config.refuse_quantized()?;
    Ok((family, config))
}

#[cfg(test)]
mod tests;
