//! Qwen3, dense: queries and keys normalised head by head, optional sliding
//! window in the layers `layer_types` names (or those from `max_window_layers` on).

use super::block::{PROJ_NAMES, decoder};
use super::config::{COUNT_MAX, Config, Defaults};
use super::{Family, FamilyError, Spec};

pub const FAMILY: Family = Family {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    model_types: &["qwen3"],
    spec,
    graph: |spec| decoder(spec, &PROJ_NAMES),
};

fn spec(config: &Config<'_>) -> Result<Spec, FamilyError> {
    let defaults =
        Defaults { family: "qwen3", rms_eps: 1e-6, rope_theta: 10_000.0, head_dim: Some(128) };
    let mut spec = config.base(&defaults)?;
    spec.qk_norm = true;
    if let Some(window) = window(config)? {
        // `Qwen3Config`: without a list, layers from `max_window_layers` (28) on slide.
        let first = match config.get("max_window_layers").and_then(|v| v.as_u64()) {
            Some(0) => 0,
            _ => config.optional("max_window_layers", COUNT_MAX)?.unwrap_or(28),
        };
        let windows = config.layer_windows("qwen3", spec.layers, Some(window))?;
        spec.windows = windows.unwrap_or_else(|| {
            (0..spec.layers).map(|layer| (layer >= first).then_some(window)).collect()
        });
    }
    Ok(spec)
}

/// The window in force: `sliding_window`, but only with `use_sliding_window`.
pub fn window(config: &Config<'_>) -> Result<Option<usize>, FamilyError> {
    match config.flag("use_sliding_window", false)? {
        true => config.optional("sliding_window", usize::MAX),
        false => Ok(None),
    }
}
