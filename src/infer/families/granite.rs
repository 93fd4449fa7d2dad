//! Granite 3, dense and with experts: Llama with four multipliers.
//!
//! `x += residual_multiplier * block(rms_norm(x))` is computed without the multiplier, on the state
//! `x / residual_multiplier`: the embeddings are divided by it and the norms' epsilons by its
//! square, which changes no norm's result. `logits_scaling` divides the final norm's vector.

use super::block::{Attention, Builder, Experts, FeedForward};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "granite",
    architectures: &["GraniteForCausalLM", "GraniteMoeForCausalLM"],
    model_types: &["granite", "granitemoe"],
    read,
};

// The defaults are those of `GraniteConfig` and `GraniteMoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let with_experts = matches!(config.architecture()?, "GraniteMoeForCausalLM" | "granitemoe");
    let shape = config.shape(HeadDim::Divided)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let attention_bias = config.flag("attention_bias", false)?;
    let multiplier = |key| config.positive(key, 1.0);
    let residual = multiplier("residual_multiplier")?;
    let eps = (config.positive("rms_norm_eps", 1e-6)? / (residual * residual)) as f32;
    let scale = multiplier("attention_multiplier")? as f32;
    let experts = with_experts.then(|| experts(config)).transpose()?;
    let bias = !with_experts && config.flag("mlp_bias", false)?;
    let plain = FeedForward::plain(config.intermediate()?, config.activation()?);
    let feed_forward = FeedForward { bias, ..plain };
    let embedding = multiplier("embedding_multiplier")? / residual;
    let logits = multiplier("logits_scaling")?.recip();
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let attention = Attention {
        scale,
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        ..Attention::new(&shape, rope, None)
    };
    let x = d.embed(shape.hidden, embedding as f32);
    for layer in 0..shape.layers {
        d.layer(layer);
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| match &experts {
            Some(experts) => d.experts(x, experts),
            None => d.feed_forward(x, &feed_forward),
        });
    }
    Ok(d.finish_scaled(x, eps, tied, logits as f32))
}

/// The softmax over the chosen experts' logits is that over all, renormalised.
fn experts(config: &Config<'_>) -> Result<Experts, FamilyError> {
    let count = config.optional("num_local_experts", COUNT_MAX)?.unwrap_or(8);
    let top_k = config.optional("num_experts_per_tok", count)?.unwrap_or(2).min(count);
    let (ff, activation) = (config.intermediate()?, config.activation()?);
    let scoring = Scoring::Softmax { renormalise: true };
    Ok(Experts {
        module: "block_sparse_moe",
        router: "router.layer",
        stacks: ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"],
        ..Experts::plain(count, top_k, ff, activation, scoring)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::read;
    use crate::graph::Op;
    use crate::source::Source;

    #[test]
    fn multipliers_are_in_embeddings_epsilons_scores_and_the_final_norm() {
        let config = json!({
            "architectures": ["GraniteForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "embedding_multiplier": 12.0, "residual_multiplier": 0.25, "logits_scaling": 8.0,
            "attention_multiplier": 0.1, "tie_word_embeddings": true,
        });
        let graph = read(&config).unwrap().graph;
        assert!(matches!(graph.ops[0], Op::Embed { scale: 48.0, .. }));
        let eps = graph.ops.iter().filter_map(|op| match op {
            Op::RmsNorm { eps, .. } => Some(*eps),
            _ => None,
        });
        assert_eq!(eps.collect::<Vec<_>>(), [1.6e-4; 3]);
        assert!(graph.ops.iter().any(|op| matches!(op, Op::Attention { scale: 0.1, .. })));
        let norm = graph.weights.iter().find(|weight| weight.tensor == "model.norm.weight");
        assert_eq!(norm.unwrap().source, Source::Itself.times(0.125));
        assert!(graph.tied());
    }
}
