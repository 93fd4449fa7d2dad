//! Qwen3-Next and Qwen3.5: gated delta nets in most layers, attention with an output gate in the
//! others; dense, or with experts beside a gated feed-forward for every token.

use serde_json::{Value, json};

use super::block::{Attention, Builder, DeltaNet, Experts, FeedForward, QueryKeyNorm, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::{DeltaShape, Scoring};

pub const FAMILY: Family = Family {
    name: "qwen3_next",
    architectures: &["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"],
    model_types: &["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"],
    read,
};

/// The widest key of a delta net (kernels/delta.wgsl).
const KEY_DIM_MAX: usize = 256;

/// The longest filter that the kernels support.
const TAPS_MAX: usize = 8;

// The defaults are those of `Qwen3NextConfig` and `Qwen3_5TextConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let is_next = config.architecture()?.to_ascii_lowercase().contains("next");
    let shape = config.shape(HeadDim::Is(256))?;
    let eps = config.rms_eps(1e-6)?;
    let (rope, partial) = RopeSpec::partial(config, 10_000.0, shape.context_max)?;
    let in_rope = config.get("rope_parameters").and_then(|set| set.get("partial_rotary_factor"));
    let is_given = config.get("partial_rotary_factor").or(in_rope).is_some();
    let rotary_dim = config.rotary_dim(shape.head_dim, if is_given { partial } else { 0.25 })?;
    config.only("attention_bias", &json!(false))?;
    config.only("attn_output_gate", &json!(true))?;
    config.only("mamba_ssm_dtype", &json!("float32"))?;
    let delta = DeltaNet { packed: is_next, ..delta(config, eps)? };
    let attends = attends(config, shape.layers)?;
    let step = config.optional("decoder_sparse_step", COUNT_MAX)?.unwrap_or(1);
    let dense = config.indices("mlp_only_layers")?;
    let experts = experts(config)?;
    let sparse = |layer: usize| {
        experts.is_some() && !dense.contains(&layer) && (layer + 1).is_multiple_of(step)
    };
    let feed_forward = match (0..shape.layers).all(sparse) {
        true => {
            config.skip(&["intermediate_size"]);
            None
        }
        false => Some(FeedForward::plain(config.intermediate()?, config.activation()?)),
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape).offset_norms();
    let rope = d.rope(&rope, rotary_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, attends) in attends.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            norm: QueryKeyNorm::Heads(eps),
            gated: true,
            ..Attention::new(&shape, rope, None)
        };
        d.residual(x, "input_layernorm", eps, |d, x| match attends {
            true => d.attention(x, &attention),
            false => d.delta_net(x, &delta),
        });
        let norm = "post_attention_layernorm";
        match (&experts, &feed_forward) {
            (Some((experts, shared)), _) if sparse(layer) => {
                d.residual_experts(x, (norm, eps), experts, Some(shared));
            }
            (_, Some(feed_forward)) => {
                d.residual(x, norm, eps, |d, x| d.feed_forward(x, feed_forward));
            }
            _ => unreachable!("a layer without experts has a feed-forward"),
        }
    }
    Ok(d.finish(x, eps, tied))
}

fn delta(config: &Config<'_>, eps: f32) -> Result<DeltaNet, FamilyError> {
    let count = |key, default, most| Ok(config.optional(key, most)?.unwrap_or(default));
    let shape = DeltaShape {
        key_heads: count("linear_num_key_heads", 16, COUNT_MAX)?,
        heads: count("linear_num_value_heads", 32, COUNT_MAX)?,
        key_dim: count("linear_key_head_dim", 128, KEY_DIM_MAX)?,
        value_dim: count("linear_value_head_dim", 128, 1 << 16)?,
    };
    if !shape.heads.is_multiple_of(shape.key_heads) {
        let want = format!("a multiple of linear_num_key_heads {}", shape.key_heads);
        return Err(bad("linear_num_value_heads", &shape.heads.into(), want));
    }
    let taps = count("linear_conv_kernel_dim", 4, TAPS_MAX)?;
    if taps < 2 {
        return Err(config.unsupported("linear_conv_kernel_dim", &taps.into(), "2 to 8"));
    }
    Ok(DeltaNet { shape, taps, eps, packed: false })
}

/// Which layers attend: those that `layer_types` names, or every `full_attention_interval`-th.
fn attends(config: &Config<'_>, layers: usize) -> Result<Vec<bool>, FamilyError> {
    let interval = config.optional("full_attention_interval", COUNT_MAX)?.unwrap_or(4);
    let Some(value) = config.get("layer_types") else {
        return Ok((1..=layers).map(|number| number.is_multiple_of(interval)).collect());
    };
    let list = value.as_array().filter(|list| list.len() == layers).ok_or_else(|| {
        bad("layer_types", value, format!("a list of num_hidden_layers = {layers} names"))
    })?;
    let attends = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(true),
        Some("linear_attention") => Ok(false),
        _ => Err(config.unsupported("layer_types", kind, "linear_attention, full_attention")),
    });
    attends.collect()
}

fn experts(config: &Config<'_>) -> Result<Option<(Experts, Shared)>, FamilyError> {
    let stated = ["num_experts", "num_local_experts"].map(|key| config.get(key));
    // Qwen3-Next is dense if the number is 0.
    let none = |value: Option<&Value>| value.is_none_or(|value| value == &json!(0));
    if stated.into_iter().all(none) {
        config.skip(&["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]);
        config.skip(&["shared_expert_intermediate_size"]);
        return Ok(None);
    }
    let count = match config.optional("num_experts", COUNT_MAX)? {
        Some(count) => count,
        None => config.required("num_local_experts", COUNT_MAX)?,
    };
    let activation = config.activation()?;
    let top_k = config.required("num_experts_per_tok", count)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    let scoring = Scoring::Softmax { renormalise: config.flag("norm_topk_prob", true)? };
    let experts = Experts::plain(count, top_k, ff, activation, scoring);
    let width = config.required("shared_expert_intermediate_size", DIMENSION_MAX)?;
    let feed_forward =
        FeedForward { module: "mlp.shared_expert", ..FeedForward::plain(width, activation) };
    Ok(Some((experts, Shared { feed_forward, gate: Some("mlp.shared_expert_gate") })))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Activation, Op, State};

    fn config(more: Value) -> Value {
        let mut config = json!({
            "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": 99, "max_position_embeddings": 512,
            "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn every_fourth_layer_attends_and_gates_its_output() {
        let graph = read(&config(json!({}))).unwrap().graph;
        let channels = 2 * 2 * 8 + 6 * 12;
        let two = [State { width: 3 * channels }, State { width: 6 * 8 * 12 }];
        assert_eq!(graph.states, two.repeat(4));
        let gated = |op: &&Op| matches!(op, Op::Gated { activation: Activation::Sigmoid, .. });
        assert_eq!((graph.kv.len(), graph.ops.iter().filter(gated).count()), (1, 1));
        assert_eq!(graph.ropes[0].inv_freq.len(), 4, "a quarter of a head rotates by default");
        assert!(graph.moe.is_empty());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("linear_key_head_dim", json!(257)),
            ("linear_num_value_heads", json!(5)),
            ("linear_conv_kernel_dim", json!(1)),
            ("layer_types", json!(["conv", "conv", "conv", "conv", "conv"])),
            ("attn_output_gate", json!(false)),
            ("attention_bias", json!(true)),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
