//! Mixtral: every layer's feed-forward is a mixture of experts, with a softmax over all of them and
//! the top ones renormalised to sum to 1.

use super::block::{Attention, Builder, Experts};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "mixtral",
    architectures: &["MixtralForCausalLM"],
    model_types: &["mixtral"],
    read,
};

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 1_000_000.0, shape.context_max)?;
    let count = match config.optional("num_local_experts", COUNT_MAX)? {
        Some(count) => count,
        None => config.optional("num_experts", COUNT_MAX)?.unwrap_or(8),
    };
    let top_k = config.optional("num_experts_per_tok", count)?.unwrap_or(2).min(count);
    let (ff, activation) = (config.intermediate()?, config.activation()?);
    let scoring = Scoring::Softmax { renormalise: true };
    let experts = Experts::plain(count, top_k, ff, activation, scoring).block_sparse();
    let window = config.optional("sliding_window", usize::MAX)?;
    let windows = windows::by_layer_types(config, shape.layers, window)?;
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention::new(&shape, rope, window);
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.experts(x, &experts));
    }
    Ok(d.finish(x, eps, tied))
}
