//! Qwen2 and Qwen2.5, dense: biases on queries, keys and values but not on the output projection;
//! sliding windows by Qwen's rule.

use super::block::{Attention, Builder, FeedForward};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family =
    Family { name: "qwen2", architectures: &["Qwen2ForCausalLM"], model_types: &["qwen2"], read };

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let windows = windows::qwen(config, shape.layers)?;
    let activation = config.activation()?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention { qkv_bias: true, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::read;

    #[test]
    fn queries_keys_and_values_have_biases_and_late_layers_slide() {
        let config = json!({
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "use_sliding_window": true,
            "sliding_window": 16, "max_window_layers": 2, "use_mrope": false,
        });
        let graph = read(&config).unwrap().graph;
        let biases = graph.weights.iter().filter(|weight| weight.tensor.ends_with(".bias"));
        let names: Vec<&str> = biases.map(|weight| weight.tensor.as_str()).take(4).collect();
        assert_eq!(names[0], "model.layers.0.self_attn.q_proj.bias");
        assert_eq!(names[2], "model.layers.0.self_attn.v_proj.bias");
        assert_eq!(names[3], "model.layers.1.self_attn.q_proj.bias", "none on o");
        assert_eq!(graph.kv[0].head_dim, 16);
    }
}
