//! Qwen3, dense: queries and keys are normalised head by head; an optional sliding window in the
//! layers that `layer_types` names (or those from `max_window_layers` on).

use super::block::{Attention, Builder, FeedForward, QueryKeyNorm};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family = Family {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM", "Qwen3Model"],
    model_types: &["qwen3"],
    read,
};

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(128))?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    let windows = windows::qwen(config, shape.layers)?;
    let bias = config.flag("attention_bias", false)?;
    let activation = config.activation()?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
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
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}
