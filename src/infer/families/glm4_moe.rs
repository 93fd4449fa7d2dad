//! GLM-4.5: dense first layers, then experts by sigmoids with a bias that chooses alone, and beside
//! them a feed-forward for every token; a part of each head rotates.

use serde_json::json;

use super::block::{Attention, Builder, Experts, FeedForward, QueryKeyNorm, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim};
use super::rope::RopeSpec;
use super::{Described, Family, groups};

pub const FAMILY: Family = Family {
    name: "glm4_moe",
    architectures: &["Glm4MoeForCausalLM"],
    model_types: &["glm4_moe"],
    read,
};

// The defaults are those of `Glm4MoeConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-5)?;
    let (rope, partial) = RopeSpec::partial(config, 10_000.0, shape.context_max)?;
    let in_rope = config.get("rope_parameters").and_then(|set| set.get("partial_rotary_factor"));
    let is_given = config.get("partial_rotary_factor").or(in_rope).is_some();
    let rotary_dim = config.rotary_dim(shape.head_dim, if is_given { partial } else { 0.5 })?;
    let qkv_bias = config.flag("attention_bias", false)?;
    let norm = match config.flag("use_qk_norm", false)? {
        true => QueryKeyNorm::Heads(eps),
        false => QueryKeyNorm::None,
    };
    let feed_forward = FeedForward::plain(config.intermediate()?, config.activation()?);
    let dense = config.count("first_k_dense_replace", 1, COUNT_MAX)?;
    let (experts, shared) = experts(config)?;
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, rotary_dim);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        let attention = Attention { qkv_bias, norm, ..Attention::new(&shape, rope, None) };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        let norm = "post_attention_layernorm";
        match layer < dense {
            true => d.residual(x, norm, eps, |d, x| d.feed_forward(x, &feed_forward)),
            false => d.residual_experts(x, (norm, eps), &experts, shared.as_ref()),
        }
    }
    Ok(d.finish(x, eps, tied))
}

fn experts(config: &Config<'_>) -> Result<(Experts, Option<Shared>), FamilyError> {
    let activation = config.activation()?;
    config.only("topk_method", &json!("noaux_tc"))?;
    config.only("scoring_func", &json!("sigmoid"))?;
    let count = config.required("n_routed_experts", COUNT_MAX)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    let renormalise = config.flag("norm_topk_prob", true)?;
    let scale = config.positive("routed_scaling_factor", 1.0)? as f32;
    let top_k = config.required("num_experts_per_tok", count)?;
    let scoring = groups::scoring(config, (count, top_k), (1, 1), (renormalise, scale))?;
    let experts = Experts {
        bias: Some("mlp.gate.e_score_correction_bias"),
        ..Experts::plain(count, top_k, ff, activation, scoring)
    };
    let width = ff * config.count("n_shared_experts", 1, COUNT_MAX)?;
    Ok((experts, Shared::plain(width, activation)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Op, Scoring};

    fn config() -> Value {
        json!({
            "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 24, "vocab_size": 99, "max_position_embeddings": 512,
            "first_k_dense_replace": 2, "n_routed_experts": 12, "num_experts_per_tok": 3,
            "moe_intermediate_size": 40, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 2.5, "rope_scaling": null, "use_qk_norm": true,
        })
    }

    #[test]
    fn first_layers_are_dense_and_shared_experts_are_one_feed_forward() {
        let graph = read(&config()).unwrap().graph;
        assert_eq!((graph.moe.len(), graph.moe[0].layer), (1, 2));
        let rows = |name: &str| {
            let name = format!("model.layers.2.mlp.{name}");
            let weight = graph.weights.iter().find(|weight| weight.tensor == name).unwrap();
            (weight.rows, weight.cols)
        };
        assert_eq!(rows("shared_experts.up_proj.weight"), (80, 64));
        assert_eq!(rows("gate.e_score_correction_bias"), (1, 12));
        assert_eq!(graph.ropes[0].inv_freq.len(), 6, "half of a head rotates by default");
        let sigmoid = Scoring::Sigmoid { renormalise: true, scale: 2.5 };
        let route =
            |op: &Op| matches!(op, Op::Route { scoring, bias: Some(_), .. } if *scoring == sigmoid);
        assert!(graph.ops.iter().any(route));
        let mut grouped = config();
        (grouped["n_group"], grouped["topk_group"]) = (4.into(), 2.into());
        let limited = Scoring::Grouped { renormalise: true, scale: 2.5, groups: 4, kept: 2 };
        let route = |op: &Op| matches!(op, Op::Route { scoring, .. } if *scoring == limited);
        assert!(read(&grouped).unwrap().graph.ops.iter().any(route));
        let mut all = config();
        all["first_k_dense_replace"] = 0.into();
        assert_eq!(read(&all).unwrap().graph.moe.len(), 3);
    }

    #[test]
    fn other_routings_are_refused_by_name() {
        for (key, value) in [
            ("n_group", json!(5)),
            ("topk_group", json!(2)),
            ("scoring_func", json!("softmax")),
            ("first_k_dense_replace", json!(-1)),
        ] {
            let mut config = config();
            config[key] = value;
            assert!(read(&config).unwrap_err().to_string().contains(key), "{key}");
        }
    }
}
