//! ERNIE 4.5 with experts: a softmax with a bias that chooses alone, shared experts as one feed-forward,
//! and queries and keys whose neighbouring elements rotate.

use serde_json::json;

use super::block::{Attention, Builder, Experts, FeedForward, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "ernie4_5_moe",
    architectures: &["Ernie4_5_MoeForCausalLM"],
    model_types: &["ernie4_5_moe"],
    read,
};

/// The smallest divisor of the chosen weights that still changes nothing in practice.
const NORM_MIN_MAX: f64 = 1e-9;

// The defaults are those of `Ernie4_5_MoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 500_000.0, shape.context_max)?;
    config.refuse(&["use_bias"])?;
    let feed_forward = FeedForward::plain(config.intermediate()?, config.activation()?);
    let first = config.count("moe_layer_start_index", 1, COUNT_MAX)?;
    // -1 is the last layer.
    let last = match config.get("moe_layer_end_index") {
        Some(value) if value.as_i64() != Some(-1) => {
            config.count("moe_layer_end_index", 0, COUNT_MAX)?
        }
        _ => shape.layers - 1,
    };
    let step = config.optional("moe_layer_interval", COUNT_MAX)?.unwrap_or(1);
    let sparse = |layer: usize| (layer + 1).is_multiple_of(step) && (first..=last).contains(&layer);
    let (experts, shared) = experts(config)?;
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        let attention = Attention { interleaved: true, ..Attention::new(&shape, rope, None) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        let norm = "post_attention_layernorm";
        match sparse(layer) {
            true => d.residual_experts(x, (norm, eps), &experts, shared.as_ref()),
            false => d.residual(x, norm, eps, |d, x| d.feed_forward(x, &feed_forward)),
        }
    }
    Ok(d.finish(x, eps, tied))
}

fn experts(config: &Config<'_>) -> Result<(Experts, Option<Shared>), FamilyError> {
    let activation = config.activation()?;
    config.only("moe_use_aux_free", &json!(true))?;
    config.only("moe_gate", &json!("topk"))?;
    // Chosen weights are divided by their sum, or by this if it is larger.
    if config.positive("moe_norm_min", 1e-12)? > NORM_MIN_MAX {
        let value = config.get("moe_norm_min").unwrap_or_default();
        return Err(bad("moe_norm_min", value, format!("at most {NORM_MIN_MAX}")));
    }
    let count = config.required("moe_num_experts", COUNT_MAX)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    let top_k = config.required("moe_k", count)?;
    let experts = Experts {
        bias: Some("mlp.moe_statics.e_score_correction_bias"),
        ..Experts::plain(count, top_k, ff, activation, Scoring::Softmax { renormalise: true })
    };
    let width = ff * config.count("moe_num_shared_experts", 2, COUNT_MAX)?;
    Ok((experts, Shared::plain(width, activation)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::source::Source;

    fn config() -> Value {
        json!({
            "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 512,
            "moe_num_experts": 12, "moe_k": 3, "moe_intermediate_size": 40,
            "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
        })
    }

    #[test]
    fn queries_and_keys_are_reordered_and_layers_are_chosen_by_index() {
        let mut config = config();
        let graph = read(&config).unwrap().graph;
        let source = |name: &str| {
            let name = format!("model.layers.3.self_attn.{name}.weight");
            graph.weights.iter().find(|weight| weight.tensor == name).unwrap().source.clone()
        };
        assert_eq!(source("q_proj"), Source::Itself.permute(8, 2));
        assert_eq!(source("k_proj"), Source::Itself.permute(8, 2));
        assert_eq!(source("v_proj"), Source::Itself);
        let layers = |config: &Value| -> Vec<usize> {
            read(config).unwrap().graph.moe.iter().map(|moe| moe.layer).collect()
        };
        assert_eq!(layers(&config), [1, 2, 3, 4]);
        config["moe_layer_end_index"] = 3.into();
        config["moe_layer_interval"] = 2.into();
        assert_eq!(layers(&config), [1, 3]);
    }

    #[test]
    fn what_would_be_another_model_is_refused() {
        for (key, value) in [
            ("use_bias", json!(true)),
            ("moe_norm_min", json!(0.1)),
            ("moe_use_aux_free", json!(false)),
            ("moe_layer_start_index", json!(-1)),
        ] {
            let mut config = config();
            config[key] = value;
            assert!(read(&config).unwrap_err().to_string().contains(key), "{key}");
        }
    }
}
