//! Qwen3-MoE: Qwen3's attention, with experts in every `decoder_sparse_step`-th layer that
//! `mlp_only_layers` does not list, and a dense feed-forward in the others.

use super::block::{Attention, Builder, Experts, FeedForward, QueryKeyNorm};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "qwen3_moe",
    architectures: &["Qwen3MoeForCausalLM"],
    model_types: &["qwen3_moe"],
    read,
};

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let bias = config.flag("attention_bias", false)?;
    let window = windows::switched(config)?;
    let windows = match window {
        Some(_) => windows::by_layer_types(config, shape.layers, window)?,
        None => vec![None; shape.layers],
    };
    config.skip(&["layer_types", "max_window_layers"]);
    let activation = config.activation()?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
    let step = config.optional("decoder_sparse_step", COUNT_MAX)?.unwrap_or(1);
    let dense = config.indices("mlp_only_layers")?;
    let sparse = |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    // Without a sparse layer, the model is dense.
    let experts = match (0..shape.layers).any(sparse) {
        true => Some(experts(config)?),
        false => {
            config.skip(&["num_experts", "num_local_experts", "num_experts_per_tok"]);
            config.skip(&["moe_intermediate_size", "norm_topk_prob"]);
            None
        }
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            qkv_bias: bias,
            out_bias: bias,
            norm: QueryKeyNorm::Heads(eps),
            ..Attention::new(&shape, rope, window)
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        let experts = experts.as_ref().filter(|_| sparse(layer));
        d.residual(x, "post_attention_layernorm", eps, |d, x| match experts {
            Some(experts) => d.experts(x, experts),
            None => d.feed_forward(x, &feed_forward),
        });
    }
    Ok(d.finish(x, eps, tied))
}

/// Qwen2-MoE names its experts alike.
pub(super) fn experts(config: &Config<'_>) -> Result<Experts, FamilyError> {
    let count = match config.optional("num_experts", COUNT_MAX)? {
        Some(count) => count,
        None => config.required("num_local_experts", COUNT_MAX)?,
    };
    // The default of both configs is false.
    let renormalise = config.flag("norm_topk_prob", false)?;
    Ok(Experts::plain(
        count,
        config.required("num_experts_per_tok", count)?,
        config.required("moe_intermediate_size", DIMENSION_MAX)?,
        config.activation()?,
        Scoring::Softmax { renormalise },
    ))
}
