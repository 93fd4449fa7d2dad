//! Llama (and Mistral, which differs by a sliding window only).
//!
//! Dense pre-norm decoder; `attention_bias` and `mlp_bias` honoured.

use super::block::{PROJ_NAMES, decoder};
use super::config::{Config, Defaults};
use super::{Family, FamilyError, Spec};

pub const FAMILY: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM", "MistralForCausalLM"],
    model_types: &["llama", "mistral"],
    spec,
    graph: |spec| decoder(spec, &PROJ_NAMES),
};

/// Positions a Mistral layer sees where its config does not say (`MistralConfig`).
const MISTRAL_WINDOW: usize = 4096;

fn spec(config: &Config<'_>) -> Result<Spec, FamilyError> {
    let defaults =
        Defaults { family: "llama", rms_eps: 1e-6, rope_theta: 10_000.0, head_dim: None };
    let mut spec = config.base(&defaults)?;
    spec.mlp_bias = config.flag("mlp_bias", false)?;
    if matches!(config.architecture()?, "MistralForCausalLM" | "mistral") {
        // An explicit null means no window; a missing key means the default one.
        let window = match config.has("sliding_window") {
            true => config.optional("sliding_window", usize::MAX)?,
            false => Some(MISTRAL_WINDOW),
        };
        let windows = config.layer_windows("mistral", spec.layers, window)?;
        spec.windows = windows.unwrap_or_else(|| vec![window; spec.layers]);
        spec.mlp_bias = false;
        spec.attention_bias = false;
    }
    Ok(spec)
}
