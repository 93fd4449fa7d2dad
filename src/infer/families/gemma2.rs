//! Gemma 2: norms before and after each sub-block, stored as the difference from 1; scores and logits
//! are capped; every second layer sees all positions.

use super::block::{Attention, Builder, FeedForward};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Activation;

pub const FAMILY: Family = Family {
    name: "gemma2",
    architectures: &["Gemma2ForCausalLM"],
    model_types: &["gemma2"],
    read,
};

// The defaults are those of `Gemma2Config`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(256))?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?.unwrap_or(4096);
    // Published configs repeat the window under this name, which Transformers does not read.
    if let Some(value) = config.get("sliding_window_size")
        && value.as_u64() != Some(window as u64)
    {
        return Err(config.unread("sliding_window_size", value));
    }
    let windows = windows::alternating(config, shape.layers, window, 2)?;
    let softcap = cap(config, "attn_logit_softcapping", 50.0)?;
    let logits_cap = cap(config, "final_logit_softcapping", 30.0)?;
    config.refuse(&["use_bidirectional_attention"])?;
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    let bias = config.flag("attention_bias", false)?;
    // Transformers does not read `hidden_act` here.
    config.skip(&["hidden_act"]);
    let activation = config.activation_of("hidden_activation", Activation::GeluTanh)?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape).offset_norms();
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, (shape.hidden as f32).sqrt());
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            scale,
            softcap,
            qkv_bias: bias,
            out_bias: bias,
            ..Attention::new(&shape, rope, window)
        };
        let norms = (Some("input_layernorm"), "post_attention_layernorm");
        d.residual_normed(x, norms, eps, |d, x| d.attention(x, &attention));
        let norms = (Some("pre_feedforward_layernorm"), "post_feedforward_layernorm");
        d.residual_normed(x, norms, eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish_capped(x, eps, tied, logits_cap))
}

/// A cap; none if the key is `null`.
fn cap(config: &Config<'_>, key: &'static str, default: f64) -> Result<Option<f32>, FamilyError> {
    let cap = config.positive(key, default)? as f32;
    let off = config.has(key) && config.get(key).is_none();
    Ok((!off).then_some(cap))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Graph, Op};

    fn config() -> Value {
        json!({
            "architectures": ["Gemma2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "query_pre_attn_scalar": 64,
            "sliding_window": 16, "sliding_window_size": 16, "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        })
    }

    /// Window, scale and cap.
    type Layer = (Option<usize>, f32, Option<f32>);

    /// Of each layer, and the cap of the logits.
    fn caps(graph: &Graph) -> (Vec<Layer>, Option<f32>) {
        let layers = graph.ops.iter().filter_map(|op| match op {
            Op::Attention { window, scale, softcap, .. } => Some((*window, *scale, *softcap)),
            _ => None,
        });
        let Some(Op::Logits { softcap, .. }) = graph.ops.last() else { panic!("no logits") };
        (layers.collect(), *softcap)
    }

    #[test]
    fn windows_alternate_and_caps_are_on_unless_null() {
        let mut config = config();
        let graph = read(&config).unwrap().graph;
        assert_eq!(graph.kv[0].head_dim, 256, "the default");
        let layer = |window| (window, 0.125, Some(50.0));
        let layers = vec![layer(Some(16)), layer(None), layer(Some(16))];
        assert_eq!(caps(&graph), (layers, Some(30.0)));
        config["attn_logit_softcapping"] = 20.0.into();
        config["final_logit_softcapping"] = Value::Null;
        config["layer_types"] = json!(["full_attention", "sliding_attention", "full_attention"]);
        let (layers, logits) = caps(&read(&config).unwrap().graph);
        assert_eq!(layers[..2], [(None, 0.125, Some(20.0)), (Some(16), 0.125, Some(20.0))]);
        assert_eq!(logits, None);
    }

    #[test]
    fn what_would_be_another_model_is_refused() {
        for (key, value) in [
            ("attn_logit_softcapping", json!(0.0)),
            ("final_logit_softcapping", json!(-30.0)),
            ("sliding_window_size", json!(17)),
            ("use_bidirectional_attention", json!(true)),
            ("hidden_activation", json!("relu")),
        ] {
            let mut config = config();
            config[key] = value;
            assert!(read(&config).unwrap_err().to_string().contains(key), "{key}");
        }
    }
}
