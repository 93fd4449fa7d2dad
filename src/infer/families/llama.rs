//! Llama (and Mistral, which differs only by a sliding window).
//!
//! A dense pre-norm decoder. `attention_bias` and `mlp_bias` are supported.

use super::block::{Attention, Builder, FeedForward};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM", "MistralForCausalLM"],
    model_types: &["llama", "mistral"],
    read,
};

/// The window of a Mistral layer if its config does not give one (`MistralConfig`).
const MISTRAL_WINDOW: usize = 4096;

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let mistral = matches!(config.architecture()?, "MistralForCausalLM" | "mistral");
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 10_000.0, shape.context_max)?;
    // Mistral's layers have no biases, and its config class has no such keys.
    let bias = |key| if mistral { Ok(false) } else { config.flag(key, false) };
    let attention_bias = bias("attention_bias")?;
    let plain = FeedForward::plain(config.intermediate()?, config.activation()?);
    let feed_forward = FeedForward { bias: bias("mlp_bias")?, ..plain };
    let windows = match mistral {
        false => vec![None; shape.layers],
        true => {
            // An explicit null means no window. A missing key means the default window.
            let window = match config.has("sliding_window") {
                true => config.optional("sliding_window", usize::MAX)?,
                false => Some(MISTRAL_WINDOW),
            };
            windows::by_layer_types(config, shape.layers, window)?
        }
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            ..Attention::new(&shape, rope, window)
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}
