//! gpt-oss: attention with sinks, sliding in every second layer, and in every layer experts with
//! biases and a clamped gate.

use serde_json::json;

use super::block::{Attention, Builder, Experts};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::{Activation, Scoring};

pub const FAMILY: Family = Family {
    name: "gpt_oss",
    architectures: &["GptOssForCausalLM"],
    model_types: &["gpt_oss"],
    read,
};

// The defaults are those of `GptOssConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(64))?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 150_000.0, shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?.unwrap_or(128);
    let windows = windows::alternating(config, shape.layers, window, 2)?;
    let bias = config.flag("attention_bias", true)?;
    let count = config.optional("num_local_experts", COUNT_MAX)?.unwrap_or(128);
    let top_k = config.optional("num_experts_per_tok", count)?.unwrap_or(count.min(4));
    // Constants of the model's code.
    config.only("hidden_act", &json!("silu"))?;
    config.only("swiglu_limit", &json!(7.0))?;
    config.only("experts_per_token", &json!(top_k))?;
    // What `rope_scaling` says, too.
    config.skip(&["initial_context_length"]);
    let scoring = Scoring::Softmax { renormalise: true };
    let plain = Experts::plain(count, top_k, config.intermediate()?, Activation::Clamped, scoring);
    let experts = Experts { router: "router", ..plain };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention =
            Attention { qkv_bias: bias, out_bias: bias, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| {
            let delta = d.attention(x, &attention);
            d.add_sinks();
            delta
        });
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.biased_experts(x, &experts));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Activation, Op};
    use crate::source::Source;

    fn config(change: Value) -> Value {
        let mut config = json!({
            "architectures": ["GptOssForCausalLM"], "hidden_size": 40, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 512,
            "num_local_experts": 6, "num_experts_per_tok": 2, "experts_per_token": 2,
            "swiglu_limit": 7.0, "initial_context_length": 4096, "sliding_window": 16,
        });
        let change = change.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(change);
        config
    }

    #[test]
    fn every_second_layer_sees_all_and_gates_and_ups_take_turns() {
        let graph = read(&config(json!({}))).unwrap().graph;
        let windows = graph.ops.iter().filter_map(|op| match op {
            Op::AttendSinks { window, sinks, .. } => {
                assert!(graph.weight_spec(*sinks).tensor.ends_with(".self_attn.sinks"));
                Some(*window)
            }
            _ => None,
        });
        assert_eq!(windows.collect::<Vec<_>>(), [Some(16), None, Some(16)]);
        let moe = &graph.moe[1];
        assert_eq!((graph.moe.len(), moe.activation), (3, Activation::Clamped));
        let biases = moe.biases.unwrap();
        assert_eq!(graph.weight_spec(biases.gate_up).cols, 6 * 48);
        assert_eq!(graph.weight_spec(biases.down).cols, 6 * 40);
        let [_, up, down] = moe.weights(2);
        let take = |start| crate::source::Take { start, count: 24, step: 2 };
        let stack = |name| Source::stored(format!("model.layers.1.mlp.experts.{name}"));
        let whole = stack("gate_up_proj").rows(80..120).cols(take(1)).transpose();
        let packed = stack("gate_up_proj_blocks").rows(take(97));
        assert_eq!(up.source, Source::FirstOf(vec![packed, whole]));
        let whole = stack("down_proj").rows(48..72).transpose();
        let packed = stack("down_proj_blocks").rows(80..120);
        assert_eq!(down.source, Source::FirstOf(vec![packed, whole]));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("swiglu_limit", json!(5.0)),
            ("hidden_act", json!("gelu")),
            ("experts_per_token", json!(3)),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
