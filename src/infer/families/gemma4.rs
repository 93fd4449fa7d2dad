//! Gemma 4 (text): sliding layers and, with wider heads, layers that see everything; norms before and
//! after each sub-block; an input of its own for each layer, last layers that read the keys and values of
//! earlier ones, keys that are also values, or experts beside the feed-forward, where the config says so.

use serde_json::{Value, json};

use super::block::{Builder, Experts, FeedForward, Gemma4Attention};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::{Activation, Scoring};

pub const FAMILY: Family = Family {
    name: "gemma4",
    architectures: &["Gemma4ForCausalLM"],
    model_types: &["gemma4_text"],
    read,
};

// The defaults are those of `Gemma4TextConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(256))?;
    let (layers, hidden) = (shape.layers, shape.hidden);
    let eps = config.rms_eps(1e-6)?;
    let ropes = RopeSpec::by_layer_type(config, 1_000_000.0, Some(10_000.0), shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?.unwrap_or(512);
    let windows = windows::alternating(config, layers, window, 6)?;
    config.only("attention_bias", &json!(false))?;
    // Of a text, no token sees a later one.
    config.only("use_bidirectional_attention", &json!("vision"))?;
    let softcap = match config.get("final_logit_softcapping") {
        None => None,
        Some(_) => Some(config.positive("final_logit_softcapping", 30.0)? as f32),
    };
    let widths = head_dims(config, &windows, shape.head_dim)?;
    let same = config.flag("attention_k_eq_v", false)?;
    let global_heads = config.optional("num_global_key_value_heads", COUNT_MAX)?;
    let shared = config.count("num_kv_shared_layers", 0, layers - 1)?;
    let own = own_layers(&windows, layers - shared)?;
    let activation = config.activation_of("hidden_activation", Activation::GeluTanh)?;
    let double = config.flag("use_double_wide_mlp", false)?;
    let width = config.intermediate()?;
    let input = config.count("hidden_size_per_layer_input", 256, DIMENSION_MAX)?;
    match input {
        0 => config.skip(&["vocab_size_per_layer_input"]),
        _ => config.only("vocab_size_per_layer_input", &json!(shape.vocab))?,
    }
    let experts = experts(config, activation)?;
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape);
    let x = d.embed(hidden, (hidden as f32).sqrt());
    let inputs = (input > 0).then(|| d.layer_inputs(x, layers, input, eps));
    for (layer, window) in windows.iter().copied().enumerate() {
        d.layer(layer);
        let head_dim = widths[layer];
        let spec = if window.is_some() { &ropes.sliding } else { &ropes.full };
        let same = same && window.is_none();
        let attention = Gemma4Attention {
            heads: shape.heads,
            kv_heads: global_heads.filter(|_| same).unwrap_or(shape.kv_heads),
            head_dim,
            rope: d.rope(spec, head_dim),
            window,
            eps,
            same,
            shares: (layer >= layers - shared).then(|| own[usize::from(window.is_some())]),
        };
        if !attention.heads.is_multiple_of(attention.kv_heads) {
            let want = format!("a divisor of num_attention_heads {}", shape.heads);
            return Err(bad("num_global_key_value_heads", &attention.kv_heads.into(), want));
        }
        let norms = (Some("input_layernorm"), "post_attention_layernorm");
        d.residual_normed(x, norms, eps, |d, x| d.gemma4_attention(x, &attention));
        let wide = double && layer >= layers - shared;
        let feed_forward = FeedForward::plain(if wide { 2 * width } else { width }, activation);
        match &experts {
            None => {
                let norms = (Some("pre_feedforward_layernorm"), "post_feedforward_layernorm");
                d.residual_normed(x, norms, eps, |d, x| d.feed_forward(x, &feed_forward));
            }
            Some(experts) => {
                let norms = (None, "post_feedforward_layernorm");
                d.residual_normed(x, norms, eps, |d, x| {
                    d.feed_forward_and_experts(x, &feed_forward, experts, eps)
                });
            }
        }
        if let Some(inputs) = inputs {
            let norms = (None, "post_per_layer_input_norm");
            d.residual_normed(x, norms, eps, |d, x| {
                d.layer_input(x, inputs, (layer, input), activation)
            });
        }
        d.scale_by(x, "layer_scalar");
    }
    Ok(d.finish_capped(x, eps, tied, softcap))
}

/// The width of a head in each layer.
fn head_dims(
    config: &Config<'_>,
    windows: &[Option<usize>],
    head_dim: usize,
) -> Result<Vec<usize>, FamilyError> {
    let by_layer = config.get("per_layer_config");
    let default = if by_layer.is_some() { head_dim } else { 512 };
    let global = match config.has("global_head_dim") {
        true => config.optional("global_head_dim", 1 << 16)?.unwrap_or(head_dim),
        false => default,
    };
    let width = |window: &Option<usize>| if window.is_some() { head_dim } else { global };
    let mut widths: Vec<usize> = windows.iter().map(width).collect();
    let Some(value) = by_layer else { return Ok(widths) };
    let want = "a set of layers, each with its head_dim";
    let sets = value.as_object().ok_or_else(|| bad("per_layer_config", value, want))?;
    for (layer, set) in sets {
        let at = layer.parse::<usize>().ok().filter(|at| *at < widths.len());
        let only = set.as_object().filter(|set| set.len() == 1);
        let head_dim = only.and_then(|set| set.get("head_dim")).and_then(Value::as_u64);
        let head_dim = head_dim.filter(|n| (2..1 << 16).contains(n) && n.is_multiple_of(2));
        let (Some(at), Some(head_dim)) = (at, head_dim) else {
            return Err(bad("per_layer_config", value, want));
        };
        widths[at] = head_dim as usize;
    }
    Ok(widths)
}

/// The last layers that see everything and that slide among those with keys and values of their own.
fn own_layers(windows: &[Option<usize>], own: usize) -> Result<[usize; 2], FamilyError> {
    let last = |slides: bool| windows[..own].iter().rposition(|window| window.is_some() == slides);
    let needed = |slides: bool| windows[own..].iter().any(|window| window.is_some() == slides);
    let mut found = [0; 2];
    for slides in [false, true] {
        found[usize::from(slides)] = match last(slides) {
            Some(layer) => layer,
            None if needed(slides) => {
                let shared = windows.len() - own;
                let want = "so few that a layer of each kind is left to share from";
                return Err(bad("num_kv_shared_layers", &shared.into(), want));
            }
            None => 0,
        };
    }
    Ok(found)
}

fn experts(config: &Config<'_>, activation: Activation) -> Result<Option<Experts>, FamilyError> {
    if !config.flag("enable_moe_block", false)? {
        config.skip(&["num_experts", "top_k_experts", "moe_intermediate_size"]);
        return Ok(None);
    }
    let count = config.required("num_experts", COUNT_MAX)?;
    let top_k = config.required("top_k_experts", count)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    Ok(Some(Experts {
        module: "router",
        router: "proj",
        stacks: ["experts.gate_up_proj", "experts.down_proj"],
        bias: Some("router.per_expert_scale"),
        ..Experts::plain(count, top_k, ff, activation, Scoring::Scaled)
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Kv, KvId, Op};

    fn config(more: Value) -> Value {
        let mut config = json!({
            "architectures": ["Gemma4ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "global_head_dim": 48, "vocab_size": 99,
            "max_position_embeddings": 512, "sliding_window": 16,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
                "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": { "rope_type": "proportional", "rope_theta": 1e6,
                    "partial_rotary_factor": 0.25 },
                "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 },
            },
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn the_last_layers_read_the_keys_and_values_of_the_last_of_their_kind() {
        let more = json!({ "num_kv_shared_layers": 3, "use_double_wide_mlp": true });
        let graph = read(&config(more)).unwrap().graph;
        let of = |head_dim| Kv { kv_heads: 2, head_dim };
        assert_eq!(graph.kv, [of(32), of(48), of(32)]);
        let read = graph.ops.iter().filter_map(|op| match op {
            Op::Attention { kv, scale, .. } => Some((*kv, *scale)),
            _ => None,
        });
        assert!(read.eq([0, 1, 2, 2, 2, 1].map(|kv| (KvId(kv), 1.0))));
        let name = |layer| format!("model.layers.{layer}.mlp.up_proj.weight");
        let rows = |layer| graph.weights.iter().find(|w| w.tensor == name(layer)).unwrap().rows;
        assert_eq!([rows(2), rows(3)], [96, 192]);
        let rope = graph.ropes.iter().find(|rope| rope.inv_freq.len() == 24).unwrap();
        assert!(rope.inv_freq[..6].iter().all(|freq| *freq > 0.0));
        assert!(rope.inv_freq[6..].iter().all(|freq| *freq == 0.0));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("attention_bias", json!(true)),
            ("use_bidirectional_attention", json!("all")),
            ("per_layer_config", json!({ "9": { "head_dim": 64 } })),
            ("per_layer_config", json!({ "1": { "sliding_window": 64 } })),
            ("num_kv_shared_layers", json!(5)),
            ("vocab_size_per_layer_input", json!(50)),
            ("hidden_activation", json!("relu")),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
        let experts = json!({ "enable_moe_block": true });
        assert!(read(&config(experts)).unwrap_err().to_string().contains("num_experts"));
    }
}
