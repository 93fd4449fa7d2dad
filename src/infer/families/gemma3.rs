//! Gemma 3, text: norms before and after each sub-block, stored as the difference from 1; a norm
//! of each query and key head; five sliding layers with a rope of their own to each full one.
//! EmbeddingGemma is the same, but each token sees the whole text.

use super::block::{Attention, Builder, FeedForward, QueryKeyNorm};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};
use crate::graph::Activation;

pub const FAMILY: Family = Family {
    name: "gemma3",
    architectures: &["Gemma3ForCausalLM", "Gemma3TextModel"],
    model_types: &["gemma3_text"],
    read,
};

// The defaults are those of `Gemma3TextConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(256))?;
    let eps = config.rms_eps(1e-6)?;
    let local_theta = config.positive("rope_local_base_freq", 10_000.0)?;
    let ropes = RopeSpec::by_layer_type(config, 1_000_000.0, Some(local_theta), shape.context_max)?;
    let window = config.optional("sliding_window", usize::MAX)?.unwrap_or(4096);
    config.refuse(&["attn_logit_softcapping", "final_logit_softcapping"])?;
    let causal = match config.architecture()? {
        "Gemma3TextModel" => !config.flag("use_bidirectional_attention", false)?,
        _ => config.refuse(&["use_bidirectional_attention"]).map(|()| true)?,
    };
    // `Gemma3TextConfig` divides the window between both sides.
    let window = if causal { window } else { window / 2 + 1 };
    // Published configs say `sliding_window_pattern`; Transformers writes it with an underscore.
    let published = config.optional("sliding_window_pattern", COUNT_MAX)?;
    let pattern = config.optional("_sliding_window_pattern", COUNT_MAX)?.or(published);
    let windows = windows::alternating(config, shape.layers, window, pattern.unwrap_or(6))?;
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    let bias = config.flag("attention_bias", false)?;
    let activation = config.activation_of("hidden_activation", Activation::GeluTanh)?;
    let feed_forward = FeedForward::plain(config.intermediate()?, activation);
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape).offset_norms();
    let full = d.rope(&ropes.full, shape.head_dim);
    let sliding = d.rope(&ropes.sliding, shape.head_dim);
    let x = d.embed(shape.hidden, (shape.hidden as f32).sqrt());
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let rope = if window.is_some() { sliding } else { full };
        let attention = Attention {
            scale,
            causal,
            qkv_bias: bias,
            out_bias: bias,
            norm: QueryKeyNorm::Heads(eps),
            ..Attention::new(&shape, rope, window)
        };
        let norms = (Some("input_layernorm"), "post_attention_layernorm");
        d.residual_normed(x, norms, eps, |d, x| d.attention(x, &attention));
        let norms = (Some("pre_feedforward_layernorm"), "post_feedforward_layernorm");
        d.residual_normed(x, norms, eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::{RopeScaling, read};
    use crate::graph::Op;
    use crate::source::Source;

    fn config() -> Value {
        json!({
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 32, "vocab_size": 99, "max_position_embeddings": 512,
            "sliding_window": 16, "query_pre_attn_scalar": 64, "rope_theta": 500000.0,
            "rope_local_base_freq": 9000.0, "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
        })
    }

    #[test]
    fn sliding_layers_have_a_rope_of_their_own_in_both_forms() {
        let mut old = config();
        let described = read(&old).unwrap();
        let [full, sliding] = &described.ropes[..] else { panic!("two ropes") };
        assert_eq!((full.theta, &full.scaling), (500_000.0, &RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((sliding.theta, &sliding.scaling), (9000.0, &RopeScaling::None));
        let windows: Vec<bool> = described
            .graph
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::Attention { window, scale, .. } => {
                    assert_eq!(*scale, 0.125);
                    Some(window.is_some())
                }
                _ => None,
            })
            .collect();
        assert_eq!(windows, [true, true, true, true, true, false, true]);
        let norms = described.graph.weights.iter().filter(|w| w.tensor.contains("norm"));
        assert!(norms.into_iter().all(|w| w.source == Source::Itself.add_one()));

        for key in ["rope_theta", "rope_local_base_freq", "rope_scaling"] {
            old.as_object_mut().unwrap().remove(key);
        }
        old["rope_parameters"] = json!({
            "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 9000.0 },
        });
        assert_eq!(read(&old).unwrap(), described);
    }

    #[test]
    fn caps_and_unknown_layer_types_are_refused() {
        let refused = |key: &str, value: Value| {
            let mut config = config();
            config[key] = value;
            read(&config).unwrap_err().to_string()
        };
        assert!(refused("attn_logit_softcapping", json!(50.0)).contains("attn_logit_softcapping"));
        assert!(refused("use_bidirectional_attention", json!(true)).contains("bidirectional"));
        let sets = json!({ "full_attention": { "rope_type": "default" }, "chunked": {} });
        assert!(refused("rope_parameters", sets).contains("rope_parameters.chunked"));
        let sets = json!({ "full_attention": { "rope_type": "default" } });
        let missing = refused("rope_parameters", sets);
        assert!(missing.contains("sliding_attention is missing"), "{missing}");
    }
}
