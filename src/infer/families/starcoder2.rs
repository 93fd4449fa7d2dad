//! StarCoder2: layer norms with biases, a feed-forward without a gate, biases everywhere, and a
//! sliding window in all layers.

use serde_json::json;

use super::block::{Attention, Builder, Ungated};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Activation;

pub const FAMILY: Family = Family {
    name: "starcoder2",
    architectures: &["Starcoder2ForCausalLM"],
    model_types: &["starcoder2"],
    read,
};

// The defaults are those of `Starcoder2Config`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.positive("norm_epsilon", 1e-5)? as f32;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?;
    let windows = windows::by_layer_types(config, shape.layers, window)?;
    let bias = config.flag("use_bias", true)?;
    config.only("norm_type", &json!("layer_norm"))?;
    config.only("mlp_type", &json!("default"))?;
    let feed_forward = Ungated {
        up: "mlp.c_fc",
        down: "mlp.c_proj",
        width: config.intermediate()?,
        activation: config.activation_of("hidden_act", Activation::GeluTanh)?,
        bias,
    };
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape).layer_norms();
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention =
            Attention { qkv_bias: bias, out_bias: bias, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.ungated(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Activation, Op};

    fn config() -> Value {
        json!({
            "architectures": ["Starcoder2ForCausalLM"], "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 50, "max_position_embeddings": 64, "sliding_window": 16,
            "norm_type": "layer_norm", "mlp_type": "default", "residual_dropout": 0.1,
            "attention_softmax_in_fp32": true, "scale_attention_softmax_in_fp32": true,
        })
    }

    #[test]
    fn everything_has_a_bias_unless_the_config_says_otherwise() {
        let graph = read(&config()).unwrap().graph;
        let biases = |graph: &crate::graph::Graph| {
            graph.weights.iter().filter(|weight| weight.tensor.ends_with(".bias")).count()
        };
        // A layer's norms, projections of attention, and feed-forward; the last norm.
        assert_eq!(biases(&graph), 2 * (2 + 4 + 2) + 1);
        let act = |op: &Op| matches!(op, Op::Activate { activation: Activation::GeluTanh, .. });
        assert_eq!(graph.ops.iter().filter(|op| act(op)).count(), 2);
        let windows = graph.ops.iter().filter_map(|op| match op {
            Op::Attention { window, .. } => Some(*window),
            _ => None,
        });
        assert!(windows.eq([Some(16); 2]));
        assert!(graph.tied());
        let mut bare = config();
        bare["use_bias"] = json!(false);
        assert_eq!(biases(&read(&bare).unwrap().graph), 2 * 2 + 1, "norms keep theirs");
    }

    #[test]
    fn other_norms_and_feed_forwards_are_refused_by_name() {
        for (key, value) in [("norm_type", "rms_norm"), ("mlp_type", "gated")] {
            let mut odd = config();
            odd[key] = json!(value);
            assert!(read(&odd).unwrap_err().to_string().contains(key));
        }
    }
}
