//! Phi-3, Phi-3.5 and Phi-4-mini: Llama, but with queries, keys and values in one tensor, and gate
//! and up in another. In Phi-4-mini a part of each head rotates.

use super::block::{Attention, Builder, FeedForward, Packed};
use super::config::{Config, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family =
    Family { name: "phi3", architectures: &["Phi3ForCausalLM"], model_types: &["phi3"], read };

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let (rope, partial) = RopeSpec::perhaps_long(config, 10_000.0, shape.context_max)?;
    let rotary_dim = config.rotary_dim(shape.head_dim, partial)?;
    rope.fits(rotary_dim)?;
    // The length from which longrope uses its long factors; without longrope it means nothing.
    config.skip(&["original_max_position_embeddings"]);
    let window = config.optional("sliding_window", usize::MAX)?;
    let windows = windows::by_layer_types(config, shape.layers, window)?;
    let feed_forward = FeedForward {
        packed: Packed::Halves("mlp.gate_up_proj"),
        ..FeedForward::plain(config.intermediate()?, config.activation()?)
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, rotary_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let packed = Some("self_attn.qkv_proj");
        let attention = Attention { packed, ..Attention::new(&shape, rope, window) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::read;
    use crate::source::Source;

    #[test]
    fn projections_are_rows_of_packed_tensors() {
        let config = json!({
            "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 50, "max_position_embeddings": 64, "resid_pdrop": 0.0,
            "original_max_position_embeddings": 4096, "sliding_window": 16,
        });
        let graph = read(&config).unwrap().graph;
        let source = |name: &str| {
            let name = format!("model.layers.1.{name}.weight");
            graph.weights.iter().find(|w| w.tensor == name).unwrap().source.clone()
        };
        let stored = |name: &str| Source::stored(format!("model.layers.1.{name}.weight"));
        let qkv = stored("self_attn.qkv_proj");
        assert_eq!(source("self_attn.q_proj"), qkv.clone().rows(0..32));
        assert_eq!(source("self_attn.k_proj"), qkv.clone().rows(32..48));
        assert_eq!(source("self_attn.v_proj"), qkv.rows(48..64));
        assert_eq!(source("self_attn.o_proj"), Source::Itself);
        assert_eq!(source("mlp.up_proj"), stored("mlp.gate_up_proj").rows(40..80));
        let with = |key: &str, value| {
            let mut odd = config.clone();
            odd[key] = value;
            read(&odd)
        };
        let part = with("partial_rotary_factor", json!(0.75)).unwrap().graph;
        assert_eq!((graph.ropes[0].inv_freq.len(), part.ropes[0].inv_freq.len()), (4, 3));
        for (key, value) in
            [("partial_rotary_factor", json!(0.4)), ("partial_rotary_factor", json!(1.5))]
        {
            assert!(with(key, value).unwrap_err().to_string().contains(key));
        }
    }

    #[test]
    fn longrope_has_a_factor_for_each_pair_and_an_original_context() {
        let mut config = json!({
            "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50,
            "max_position_embeddings": 128, "original_max_position_embeddings": 32,
            "rope_scaling": { "type": "longrope", "short_factor": [1.0, 1.0, 2.0, 2.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0] },
        });
        let rope = read(&config).unwrap().graph.ropes.remove(0);
        let long = rope.long.unwrap();
        assert_eq!(long.from, 32);
        assert_eq!((rope.inv_freq[0], long.inv_freq[0]), (1.0, 1.0));
        assert_eq!((rope.inv_freq[2], long.inv_freq[2]), (0.005, 0.0025));
        // sqrt(1 + ln 4 / ln 32)
        assert!((rope.attention_factor - 1.183_216).abs() < 1e-6, "{}", rope.attention_factor);
        for (key, list) in [("short_factor", json!([1.0])), ("long_factor", json!([1.0, 2.0, 3.0]))]
        {
            let mut odd = config.clone();
            odd["rope_scaling"][key] = list;
            assert!(read(&odd).unwrap_err().to_string().contains(key));
        }
        config["rope_scaling"]["long_factor"] = json!([1.0, -2.0, 4.0, 8.0]);
        assert!(read(&config).unwrap_err().to_string().contains("long_factor"));
    }
}
