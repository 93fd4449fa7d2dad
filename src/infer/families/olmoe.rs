//! OLMoE: experts in every layer; a norm of all query heads together and one of all key heads.

use super::block::{Attention, Builder, Experts, QueryKeyNorm};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family =
    Family { name: "olmoe", architectures: &["OlmoeForCausalLM"], model_types: &["olmoe"], read };

// The defaults are those of `OlmoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let bias = config.flag("attention_bias", false)?;
    config.refuse(&["clip_qkv"])?;
    let count = match config.optional("num_experts", COUNT_MAX)? {
        Some(count) => count,
        None => config.optional("num_local_experts", COUNT_MAX)?.unwrap_or(64),
    };
    let experts = Experts::plain(
        count,
        config.optional("num_experts_per_tok", count)?.unwrap_or(8),
        config.intermediate()?,
        config.activation()?,
        Scoring::Softmax { renormalise: config.flag("norm_topk_prob", false)? },
    );
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        let attention = Attention {
            qkv_bias: bias,
            out_bias: bias,
            norm: QueryKeyNorm::Whole(eps),
            ..Attention::new(&shape, rope, None)
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.experts(x, &experts));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::read;

    #[test]
    fn queries_and_keys_are_normed_as_a_whole_and_clipping_is_refused() {
        let mut config = json!({
            "architectures": ["OlmoeForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "num_experts": 12,
            "num_experts_per_tok": 3, "clip_qkv": null,
        });
        let graph = read(&config).unwrap().graph;
        let cols = |name: &str| {
            let weight = graph.weights.iter().find(|weight| weight.tensor.ends_with(name)).unwrap();
            weight.cols
        };
        assert_eq!((cols("q_norm.weight"), cols("k_norm.weight")), (64, 32));
        assert_eq!((graph.moe[0].experts.len(), graph.moe[0].top_k, graph.moe[0].ff), (12, 3, 32));
        config["clip_qkv"] = 8.0.into();
        assert!(read(&config).unwrap_err().to_string().contains("clip_qkv 8.0 is not supported"));
    }
}
