//! Phi-3.5-MoE: layer norms with biases, and in every layer experts of which two are chosen by
//! SparseMixer. The logits of published checkpoints have a bias.

use serde_json::json;

use super::block::{Attention, Builder, Experts};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "phimoe",
    architectures: &["PhimoeForCausalLM"],
    model_types: &["phimoe"],
    read,
};

// The defaults are those of `PhimoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 1_000_000.0, shape.context_max)?;
    let count = config.optional("num_local_experts", COUNT_MAX)?.unwrap_or(16);
    // SparseMixer chooses two.
    config.only("num_experts_per_tok", &json!(2))?;
    let top_k = count.min(2);
    let jitter = config.positive("router_jitter_noise", 0.01)? as f32;
    let (ff, activation) = (config.intermediate()?, config.activation()?);
    let scoring = Scoring::Mixer { jitter };
    let experts = Experts::plain(count, top_k, ff, activation, scoring).block_sparse();
    let window = config.optional("sliding_window", usize::MAX)?;
    let windows = windows::by_layer_types(config, shape.layers, window)?;
    let bias = config.flag("attention_bias", false)?;
    let head_bias = config.flag("lm_head_bias", false)?;
    config.skip(&["input_jitter_noise"]);
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape).layer_norms().head_bias(head_bias);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention =
            Attention { qkv_bias: bias, out_bias: bias, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.experts(x, &experts));
    }
    Ok(d.finish(x, eps, tied))
}
