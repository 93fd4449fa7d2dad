//! LFM2: layers of short gated convolutions and layers of attention; dense, or with experts by
//! sigmoids after dense first layers.

use serde_json::json;

use super::block::{Attention, Builder, Experts, FeedForward, QueryKeyNorm};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "lfm2",
    architectures: &["Lfm2ForCausalLM", "Lfm2MoeForCausalLM"],
    model_types: &["lfm2", "lfm2_moe"],
    read,
};

/// The longest filter that the kernels support.
const TAPS_MAX: usize = 8;

/// The names of gate, up and down.
const NAMES: [&str; 3] = ["w1", "w3", "w2"];

// The defaults are those of `Lfm2Config` and `Lfm2MoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.positive("norm_eps", 1e-5)? as f32;
    let theta = config.positive("theta", 1_000_000.0)?;
    let rope = RopeSpec::from_config(config, theta, shape.context_max)?;
    let taps = config.optional("conv_L_cache", TAPS_MAX)?.unwrap_or(3);
    if taps < 2 {
        return Err(config.unsupported("conv_L_cache", &taps.into(), "2 to 8"));
    }
    config.only("conv_bias", &json!(false))?;
    same_shapes(config, shape.hidden, shape.heads)?;
    let attends = attends(config, shape.layers)?;
    let experts = experts(config, shape.layers)?;
    let width = width(config, experts.is_some())?;
    let feed_forward = FeedForward {
        module: "feed_forward",
        names: NAMES,
        ..FeedForward::plain(width, config.activation()?)
    };
    let tied = match config.get("tie_embedding") {
        Some(_) => config.flag("tie_embedding", true)?,
        None => config.flag("tie_word_embeddings", true)?,
    };
    config.skip(&["tie_word_embeddings"]);

    let mut d = Builder::new(&shape).last_norm("embedding_norm");
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, attends) in attends.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            norm: QueryKeyNorm::Heads(eps),
            names: ["self_attn.q_layernorm", "self_attn.k_layernorm", "self_attn.out_proj"],
            ..Attention::new(&shape, rope, None)
        };
        d.residual(x, "operator_norm", eps, |d, x| match attends {
            true => d.attention(x, &attention),
            false => d.short_conv(x, taps),
        });
        match &experts {
            Some((dense, experts)) if layer >= *dense => {
                d.residual_experts(x, ("ffn_norm", eps), experts, None);
            }
            _ => d.residual(x, "ffn_norm", eps, |d, x| d.feed_forward(x, &feed_forward)),
        }
    }
    Ok(d.finish(x, eps, tied))
}

/// Older configs state some widths several times, and how weights were drawn before the training.
fn same_shapes(config: &Config<'_>, hidden: usize, heads: usize) -> Result<(), FamilyError> {
    for key in ["block_dim", "conv_dim", "conv_dim_out"] {
        config.only(key, &json!(hidden))?;
    }
    config.only("num_heads", &json!(heads))?;
    config.only("block_use_swiglu", &json!(true))?;
    config.only("use_pos_enc", &json!(true))?;
    config.only("block_norm_eps", &json!(config.positive("norm_eps", 1e-5)?))?;
    config.skip(&["block_use_xavier_init", "conv_use_xavier_init"]);
    config.skip(&["block_mlp_init_scale", "block_out_init_scale"]);
    Ok(())
}

/// Which layers attend; the others convolve.
fn attends(config: &Config<'_>, layers: usize) -> Result<Vec<bool>, FamilyError> {
    let Some(value) = config.get("layer_types") else {
        if config.get("full_attn_idxs").is_none() {
            return Ok(vec![true; layers]);
        }
        let list = config.indices("full_attn_idxs")?;
        if let Some(layer) = list.iter().find(|layer| **layer >= layers) {
            let want = format!("layer numbers below num_hidden_layers {layers}");
            return Err(bad("full_attn_idxs", &(*layer).into(), want));
        }
        return Ok((0..layers).map(|layer| list.contains(&layer)).collect());
    };
    config.skip(&["full_attn_idxs"]);
    let list = value.as_array().filter(|list| list.len() == layers).ok_or_else(|| {
        bad("layer_types", value, format!("a list of num_hidden_layers = {layers} names"))
    })?;
    let attends = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(true),
        Some("conv") => Ok(false),
        _ => Err(config.unsupported("layer_types", kind, "conv, full_attention")),
    });
    attends.collect()
}

/// The width of a dense feed-forward, which a config without experts may give before it is adjusted.
fn width(config: &Config<'_>, has_experts: bool) -> Result<usize, FamilyError> {
    if has_experts {
        return config.intermediate();
    }
    let given = match config.optional("block_ff_dim", DIMENSION_MAX)? {
        Some(width) => {
            config.skip(&["intermediate_size"]);
            width
        }
        None => config.intermediate()?,
    };
    let multiple = config.optional("block_multiple_of", DIMENSION_MAX)?.unwrap_or(256);
    let factor = match config.has("block_ffn_dim_multiplier") {
        true => config.positive("block_ffn_dim_multiplier", 1.0)?,
        false => 1.0,
    };
    if !config.flag("block_auto_adjust_ff_dim", true)? {
        return Ok(given);
    }
    // As Transformers: rounded down twice, then up.
    let width = ((2 * given / 3) as f64 * factor) as usize;
    match width.next_multiple_of(multiple) {
        width if (1..=DIMENSION_MAX).contains(&width) => Ok(width),
        width => Err(bad(
            "block_ffn_dim_multiplier",
            &factor.into(),
            format!("a width up to {DIMENSION_MAX}, not {width}"),
        )),
    }
}

/// How many first layers are dense, and the experts of the others.
fn experts(config: &Config<'_>, layers: usize) -> Result<Option<(usize, Experts)>, FamilyError> {
    let Some(count) = config.optional("num_experts", COUNT_MAX)? else { return Ok(None) };
    let scoring = Scoring::Sigmoid {
        renormalise: config.flag("norm_topk_prob", true)?,
        scale: config.positive("routed_scaling_factor", 1.0)? as f32,
    };
    let top_k = config.required("num_experts_per_tok", count)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    let bias = config.flag("use_expert_bias", true)?;
    let [gate, up, down] = NAMES;
    let experts = Experts {
        module: "feed_forward",
        stacks: ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        gate,
        up,
        down,
        bias: bias.then_some("feed_forward.expert_bias"),
        ..Experts::plain(count, top_k, ff, config.activation()?, scoring)
    };
    Ok(Some((config.count("num_dense_layers", 2, COUNT_MAX)?.min(layers), experts)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{ConvForm, Op, State};

    fn config(more: Value) -> Value {
        let mut config = json!({
            "architectures": ["Lfm2ForCausalLM"], "hidden_size": 64, "intermediate_size": 150,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "conv_L_cache": 4,
            "block_multiple_of": 24, "full_attn_idxs": [1],
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn layers_convolve_or_attend_and_the_width_is_adjusted() {
        let graph = read(&config(json!({}))).unwrap().graph;
        assert_eq!(graph.states, [State { width: 3 * 64 }; 2]);
        assert_eq!(graph.kv.len(), 1);
        let gated = |op: &&Op| matches!(op, Op::Conv { form: ConvForm::Gated, .. });
        assert_eq!(graph.ops.iter().filter(gated).count(), 2);
        let width = |config| {
            let graph = read(&config).unwrap().graph;
            let name = "model.layers.0.feed_forward.w1.weight";
            graph.weights.iter().find(|weight| weight.tensor == name).unwrap().rows
        };
        assert_eq!(width(config(json!({}))), 120, "100, rounded up to a multiple of 24");
        assert_eq!(width(config(json!({ "block_ffn_dim_multiplier": 1.5 }))), 168);
        assert_eq!(width(config(json!({ "block_auto_adjust_ff_dim": false }))), 150);
        assert_eq!(width(config(json!({ "block_ff_dim": 36 }))), 24);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("conv_bias", json!(true)),
            ("conv_L_cache", json!(1)),
            ("conv_L_cache", json!(9)),
            ("conv_dim", json!(32)),
            ("block_use_swiglu", json!(false)),
            ("full_attn_idxs", json!([3])),
            ("layer_types", json!(["conv", "conv", "sliding_attention"])),
            ("conv_new", json!(2)),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
