//! Qwen2-MoE and Qwen1.5-MoE: Qwen2 with experts, and beside them a feed-forward for every token whose
//! result is gated by a sigmoid.

use super::block::{Attention, Builder, Experts, FeedForward, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, qwen3_moe, windows};

pub const FAMILY: Family = Family {
    name: "qwen2_moe",
    architectures: &["Qwen2MoeForCausalLM"],
    model_types: &["qwen2_moe"],
    read,
};

// The defaults are those of `Qwen2MoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let qkv_bias = config.flag("qkv_bias", true)?;
    let windows = windows::qwen(config, shape.layers)?;
    let activation = config.activation()?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
    let step = config.optional("decoder_sparse_step", COUNT_MAX)?.unwrap_or(1);
    let dense = config.indices("mlp_only_layers")?;
    let sparse = |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    let (experts, shared) = experts(config)?;
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention { qkv_bias, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        let norm = "post_attention_layernorm";
        match sparse(layer) {
            true => d.residual_experts(x, (norm, eps), &experts, Some(&shared)),
            false => d.residual(x, norm, eps, |d, x| d.feed_forward(x, &feed_forward)),
        }
    }
    Ok(d.finish(x, eps, tied))
}

fn experts(config: &Config<'_>) -> Result<(Experts, Shared), FamilyError> {
    let activation = config.activation()?;
    let experts = qwen3_moe::experts(config)?;
    let width = config.required("shared_expert_intermediate_size", DIMENSION_MAX)?;
    let feed_forward =
        FeedForward { module: "mlp.shared_expert", ..FeedForward::plain(width, activation) };
    Ok((experts, Shared { feed_forward, gate: Some("mlp.shared_expert_gate") }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Op, WeightRole};

    fn config() -> Value {
        json!({
            "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "num_experts": 12,
            "num_experts_per_tok": 3, "moe_intermediate_size": 40, "sliding_window": 32768,
            "use_sliding_window": false, "max_window_layers": 28, "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 56, "norm_topk_prob": false, "mlp_only_layers": [1],
        })
    }

    #[test]
    fn a_gated_feed_forward_stands_beside_the_experts_of_sparse_layers() {
        let graph = read(&config()).unwrap().graph;
        assert_eq!((graph.moe.len(), graph.moe[1].layer, graph.moe[1].ff), (2, 2, 40));
        let weight = |name: &str| {
            let name = format!("model.layers.2.mlp.shared_expert{name}.weight");
            let weight = graph.weights.iter().find(|weight| weight.tensor == name).unwrap();
            (weight.rows, weight.cols, weight.role)
        };
        assert_eq!(weight("_gate"), (1, 64, WeightRole::Other));
        assert_eq!(weight(".up_proj"), (56, 64, WeightRole::Up));
        let gated = graph.ops.iter().filter(|op| matches!(op, Op::AddGated { .. }));
        assert_eq!(gated.count(), 2);
        let biases = graph.weights.iter().filter(|weight| weight.role == WeightRole::Bias);
        assert_eq!(biases.count(), 9, "queries, keys and values have biases by default");
    }

    #[test]
    fn missing_widths_are_named() {
        for key in
            ["shared_expert_intermediate_size", "moe_intermediate_size", "num_experts_per_tok"]
        {
            let mut config = config();
            config[key] = Value::Null;
            let error = read(&config).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("missing"), "{error}");
        }
    }
}
