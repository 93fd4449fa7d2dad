//! Nemotron and Minitron: layer norms with biases, stored as the difference from 1; a feed-forward
//! without a gate, whose activation is the square of ReLU; a part of each head rotates.

use super::block::{Attention, Builder, Ungated};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Activation;

pub const FAMILY: Family = Family {
    name: "nemotron",
    architectures: &["NemotronForCausalLM"],
    model_types: &["nemotron"],
    read,
};

// The defaults are those of `NemotronConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.positive("norm_eps", 1e-5)? as f32;
    let (rope, partial) = RopeSpec::partial(config, 10_000.0, shape.context_max)?;
    let in_rope = config.get("rope_parameters").and_then(|set| set.get("partial_rotary_factor"));
    let is_given = config.get("partial_rotary_factor").or(in_rope).is_some();
    let rotary_dim = config.rotary_dim(shape.head_dim, if is_given { partial } else { 0.5 })?;
    let attention_bias = config.flag("attention_bias", false)?;
    let feed_forward = Ungated {
        up: "mlp.up_proj",
        down: "mlp.down_proj",
        width: config.intermediate()?,
        activation: config.activation_of("hidden_act", Activation::SquaredRelu)?,
        bias: config.flag("mlp_bias", false)?,
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape).offset_norms().layer_norms();
    let rope = d.rope(&rope, rotary_dim);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        let attention = Attention {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            ..Attention::new(&shape, rope, None)
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.ungated(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::read;
    use crate::graph::{Activation, Op};
    use crate::source::Source;

    #[test]
    fn norms_are_offset_and_half_of_a_head_rotates_by_default() {
        let mut config = json!({
            "architectures": ["NemotronForCausalLM"], "hidden_size": 64, "intermediate_size": 40,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 50, "max_position_embeddings": 64, "hidden_act": "relu2",
        });
        let graph = read(&config).unwrap().graph;
        assert_eq!(graph.ropes[0].inv_freq.len(), 4);
        let source = |name: &str| {
            let found = graph.weights.iter().find(|weight| weight.tensor == name).unwrap();
            found.source.clone()
        };
        let norm = "model.layers.0.post_attention_layernorm";
        assert_eq!(source(&format!("{norm}.weight")), Source::Itself.add_one());
        assert_eq!(source(&format!("{norm}.bias")), Source::Itself);
        let act = |op: &Op| matches!(op, Op::Activate { activation: Activation::SquaredRelu, .. });
        assert!(graph.ops.iter().any(act));
        config["partial_rotary_factor"] = json!(0.25);
        assert_eq!(read(&config).unwrap().graph.ropes[0].inv_freq.len(), 2);
    }
}
