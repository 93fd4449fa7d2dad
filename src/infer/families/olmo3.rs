//! OLMo 3: norms after each sub-block instead of before; a norm of all query heads together and one
//! of all key heads; three sliding layers, without rope scaling, to each full one.

use super::block::{Attention, Builder, FeedForward, QueryKeyNorm};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family =
    Family { name: "olmo3", architectures: &["Olmo3ForCausalLM"], model_types: &["olmo3"], read };

// The defaults are those of `Olmo3Config`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let ropes = RopeSpec::by_layer_type(config, 10_000.0, None, shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?.unwrap_or(4096);
    let windows = windows::alternating(config, shape.layers, window, 4)?;
    let bias = config.flag("attention_bias", false)?;
    let feed_forward = FeedForward::plain(config.intermediate()?, config.activation()?);
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let full = d.rope(&ropes.full, shape.head_dim);
    let sliding = d.rope(&ropes.sliding, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let rope = if window.is_some() { sliding } else { full };
        let attention = Attention {
            qkv_bias: bias,
            out_bias: bias,
            norm: QueryKeyNorm::Whole(eps),
            ..Attention::new(&shape, rope, window)
        };
        let after = (None, "post_attention_layernorm");
        d.residual_normed(x, after, eps, |d, x| d.attention(x, &attention));
        let after = (None, "post_feedforward_layernorm");
        d.residual_normed(x, after, eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::{RopeScaling, read};
    use crate::graph::Op;

    #[test]
    fn sliding_layers_are_not_scaled_and_norms_follow() {
        let config = json!({
            "architectures": ["Olmo3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "rope_theta": 500000.0,
            "rope_scaling": { "rope_type": "yarn", "factor": 8.0,
                "original_max_position_embeddings": 64, "attention_factor": 1.2 },
        });
        let described = read(&config).unwrap();
        let [full, sliding] = &described.ropes[..] else { panic!("two ropes") };
        assert!(matches!(full.scaling, RopeScaling::Yarn { factor: 8.0, .. }));
        assert_eq!((sliding.theta, &sliding.scaling), (500_000.0, &RopeScaling::None));
        let graph = described.graph;
        assert!(matches!(graph.ops[1], Op::Linear { .. }), "nothing is normed before");
        let norms = graph.weights.iter().filter(|weight| weight.tensor.contains("norm"));
        let cols: Vec<usize> = norms.map(|weight| weight.cols).take(4).collect();
        assert_eq!(cols, [64, 32, 64, 64], "queries, keys, after attention, after the rest");
    }
}
