//! Model families: each file turns a checkpoint's config into the op list.
//!
//! A family's file reads Hugging Face's `config.json` and calls `block`'s pieces; nothing
//! knows all families but the list below. Both forms of rope keys are read (`rope_theta`
//! beside `rope_scaling`, and `rope_parameters`). Whatever would change the model's output
//! and is not understood is refused by name, never ignored. Tensor names in the graph are
//! Hugging Face's.

mod block;
mod config;
mod harmless;
mod rope;
mod windows;

use super::graph::Graph;
use config::Config;
pub use config::{COUNT_MAX, FamilyError};
pub use rope::{RopeScaling, RopeSpec};

/// Declares each family's module, and lists them.
macro_rules! families {
    ($($name:ident,)+) => {
        $(mod $name;)+
        const FAMILIES: &[Family] = &[$($name::FAMILY),+];
    };
}

families! {
    llama,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
}

/// A family: what it is called, which architectures it reads, and how.
struct Family {
    name: &'static str,
    /// Values of `architectures[0]`.
    architectures: &'static [&'static str],
    /// Values of `model_type`, asked when `architectures` is absent.
    model_types: &'static [&'static str],
    read: fn(&Config<'_>) -> Result<Described, FamilyError>,
}

/// A model as its config describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    pub graph: Graph,
    /// How each of the graph's rope tables came about.
    pub ropes: Vec<RopeSpec>,
}

/// The architectures that can be run, as `architectures` spells them.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|family| family.architectures.iter().copied()).collect()
}

/// The op list of one step of the model that a checkpoint's `config.json` describes.
///
/// # Errors
/// One line naming the architecture, or the key that is missing, out of bounds, not
/// supported, or not read by the family and not known to be harmless.
pub fn read(config: &serde_json::Value) -> Result<Described, FamilyError> {
    let (family, config) = family(config)?;
    let described = (family.read)(&config)?;
    config.all_read()?;
    Ok(described)
}

/// The name of the family that reads this config: `llama`, `qwen3_moe` and so on.
///
/// # Errors
/// An architecture that is missing or unknown.
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
