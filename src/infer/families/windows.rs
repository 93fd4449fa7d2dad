//! Which positions each layer sees: `layer_types`, `sliding_window` and their relatives.
//!
//! A window is a number of positions, including the token's own; `None` means all.

use super::config::{COUNT_MAX, Config, FamilyError, bad};

/// One entry per layer.
pub type Windows = Vec<Option<usize>>;

/// `layer_types` as windows: `sliding_attention` layers see `window` positions, `full_attention`
/// layers see all. Without the key, every layer sees `window`.
pub fn by_layer_types(
    config: &Config<'_>,
    layers: usize,
    window: Option<usize>,
) -> Result<Windows, FamilyError> {
    Ok(layer_types(config, layers, window)?.unwrap_or_else(|| vec![window; layers]))
}

/// `layer_types`, or without that list: every `full_every`-th layer sees all positions, the others
/// see `window`.
pub fn alternating(
    config: &Config<'_>,
    layers: usize,
    window: usize,
    full_every: usize,
) -> Result<Windows, FamilyError> {
    let pattern = |layer: usize| (!(layer + 1).is_multiple_of(full_every)).then_some(window);
    let listed = layer_types(config, layers, Some(window))?;
    Ok(listed.unwrap_or_else(|| (0..layers).map(pattern).collect()))
}

/// Qwen's rule: no layer has a sliding window without `use_sliding_window`. With it, the layers
/// that `layer_types` names have one, or without that list the layers from `max_window_layers` on.
pub fn qwen(config: &Config<'_>, layers: usize) -> Result<Windows, FamilyError> {
    let Some(window) = switched(config)? else {
        config.skip(&["layer_types", "max_window_layers"]);
        return Ok(vec![None; layers]);
    };
    let first = match config.get("max_window_layers").and_then(|v| v.as_u64()) {
        Some(0) => 0,
        // The default of Transformers' config classes.
        _ => config.optional("max_window_layers", COUNT_MAX)?.unwrap_or(28),
    };
    let late = || (0..layers).map(|layer| (layer >= first).then_some(window)).collect();
    Ok(layer_types(config, layers, Some(window))?.unwrap_or_else(late))
}

/// `sliding_window`, if `use_sliding_window` is on.
pub fn switched(config: &Config<'_>) -> Result<Option<usize>, FamilyError> {
    if config.flag("use_sliding_window", false)? {
        return config.optional("sliding_window", usize::MAX);
    }
    config.skip(&["sliding_window"]);
    Ok(None)
}

fn layer_types(
    config: &Config<'_>,
    layers: usize,
    window: Option<usize>,
) -> Result<Option<Windows>, FamilyError> {
    let Some(value) = config.get("layer_types") else { return Ok(None) };
    let list = value.as_array().filter(|list| list.len() == layers).ok_or_else(|| {
        bad("layer_types", value, format!("a list of num_hidden_layers = {layers} names"))
    })?;
    let windows = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => Err(FamilyError::Missing { key: "sliding_window" }),
        _ => Err(config.unsupported("layer_types", kind, "full_attention, sliding_attention")),
    });
    windows.collect::<Result<Windows, _>>().map(Some)
}
