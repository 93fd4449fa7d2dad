//! MiniMax-M2: experts in every layer by sigmoids, with a bias that chooses alone; a norm of all query
//! heads together and one of all key heads; a part of each head rotates.

use serde_json::json;

use super::block::{Attention, Builder, Experts, QueryKeyNorm};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "minimax_m2",
    architectures: &["MiniMaxM2ForCausalLM"],
    model_types: &["minimax_m2"],
    read,
};

fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let (rope, partial) = RopeSpec::partial(config, 5_000_000.0, shape.context_max)?;
    // Given as a width, as a part, or as both.
    let rotary_dim = match config.optional("rotary_dim", shape.head_dim)? {
        Some(width) if partial == 1.0 || partial * shape.head_dim as f64 == width as f64 => {
            config.rotary_dim(shape.head_dim, width as f64 / shape.head_dim as f64)?
        }
        Some(_) => {
            let want = format!("what partial_rotary_factor {partial} says");
            let value = config.get("rotary_dim").unwrap_or_default();
            return Err(bad("rotary_dim", value, want));
        }
        None => config.rotary_dim(shape.head_dim, partial)?,
    };
    for (key, value) in [
        ("use_qk_norm", json!(true)),
        ("qk_norm_type", json!("per_layer")),
        ("scoring_func", json!("sigmoid")),
        ("use_routing_bias", json!(true)),
        ("shared_intermediate_size", json!(0)),
    ] {
        config.only(key, &value)?;
    }
    let count = match config.optional("num_local_experts", COUNT_MAX)? {
        Some(count) => count,
        None => config.required("num_experts", COUNT_MAX)?,
    };
    let top_k = config.required("num_experts_per_tok", count)?;
    let (ff, activation) = (config.intermediate()?, config.activation()?);
    let scoring = Scoring::Sigmoid { renormalise: true, scale: 1.0 };
    let experts = Experts {
        bias: Some("block_sparse_moe.e_score_correction_bias"),
        ..Experts::plain(count, top_k, ff, activation, scoring).block_sparse()
    };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, rotary_dim);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        let attention =
            Attention { norm: QueryKeyNorm::Whole(eps), ..Attention::new(&shape, rope, None) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.experts(x, &experts));
    }
    Ok(d.finish(x, eps, tied))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::Op;

    fn config() -> Value {
        json!({
            "architectures": ["MiniMaxM2ForCausalLM"], "hidden_size": 64, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": 99, "max_position_embeddings": 512,
            "num_local_experts": 12, "num_experts_per_tok": 3, "rotary_dim": 16,
            "scoring_func": "sigmoid", "use_routing_bias": true, "use_qk_norm": true,
            "qk_norm_type": "per_layer", "shared_intermediate_size": 0,
        })
    }

    #[test]
    fn the_rotated_part_is_a_width_or_a_factor() {
        let mut config = config();
        let pairs = |config: &Value| read(config).unwrap().graph.ropes[0].inv_freq.len();
        assert_eq!(pairs(&config), 8);
        config["partial_rotary_factor"] = 0.5.into();
        assert_eq!(pairs(&config), 8);
        config["partial_rotary_factor"] = 0.25.into();
        assert!(read(&config).unwrap_err().to_string().contains("rotary_dim is 16"));
        config["rotary_dim"] = Value::Null;
        assert_eq!(pairs(&config), 4);
    }

    #[test]
    fn every_layer_chooses_with_a_bias_and_other_forms_are_refused() {
        let graph = read(&config()).unwrap().graph;
        let routes = graph.ops.iter().filter(|op| matches!(op, Op::Route { bias: Some(_), .. }));
        assert_eq!(routes.count(), 2);
        for (key, value) in [
            ("scoring_func", json!("softmax")),
            ("shared_intermediate_size", json!(64)),
            ("use_qk_norm", json!(false)),
            ("attn_type_list", json!([1, 0])),
        ] {
            let mut config = config();
            config[key] = value;
            assert!(read(&config).unwrap_err().to_string().contains(key), "{key}");
        }
    }
}
