//! DeepSeek-V2 Lite, DeepSeek-V3 and what is built like it (Kimi K2, Moonlight): latent attention,
//! dense first layers, then experts beside a feed-forward for every token. V3 chooses experts by
//! sigmoids, with a bias that chooses alone, within the best groups of them.

use serde_json::{Value, json};

use super::block::{Builder, Experts, FeedForward, Latent, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::{RopeScaling, RopeSpec};
use super::{Described, Family, groups};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "deepseek",
    architectures: &["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"],
    model_types: &["deepseek_v3", "deepseek_v2"],
    read,
};

// The defaults are those of `DeepseekV3Config` and `DeepseekV2Config`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let third = config.architecture()?.to_ascii_lowercase().contains("v3");
    let shape = config.shape(HeadDim::Is(64))?;
    let eps = config.rms_eps(1e-6)?;
    let (rope, latent) = latent(config, shape.heads, third, shape.context_max)?;
    config.only("num_key_value_heads", &json!(shape.heads))?;
    for (key, value) in [
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("moe_layer_freq", json!(1)),
        ("ep_size", json!(1)),
    ] {
        config.only(key, &value)?;
    }
    let feed_forward = FeedForward::plain(config.intermediate()?, config.activation()?);
    let dense = config.count("first_k_dense_replace", if third { 3 } else { 0 }, COUNT_MAX)?;
    let (experts, shared) = experts(config, third)?;
    config.skip(&["seq_aux", "aux_loss_alpha"]);
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, latent.rotated);
    let x = d.embed(shape.hidden, 1.0);
    for layer in 0..shape.layers {
        d.layer(layer);
        d.residual(x, "input_layernorm", eps, |d, x| d.latent_attention(x, &latent, rope));
        let norm = "post_attention_layernorm";
        match layer < dense {
            true => d.residual(x, norm, eps, |d, x| d.feed_forward(x, &feed_forward)),
            false => d.residual_experts(x, (norm, eps), &experts, shared.as_ref()),
        }
    }
    Ok(d.finish(x, eps, tied))
}

fn latent(
    config: &Config<'_>,
    heads: usize,
    third: bool,
    context_max: usize,
) -> Result<(RopeSpec, Latent), FamilyError> {
    const WIDTH_MAX: usize = 1 << 16;
    let rope = RopeSpec::from_config(config, 10_000.0, context_max)?;
    let width = |key, default| Ok(config.optional(key, WIDTH_MAX)?.unwrap_or(default));
    let (plain, rotated) = (width("qk_nope_head_dim", 128)?, width("qk_rope_head_dim", 64)?);
    let value = width("v_head_dim", 128)?;
    if !rotated.is_multiple_of(2) {
        return Err(bad("qk_rope_head_dim", &rotated.into(), "an even number"));
    }
    // Values are kept in a cache as wide as that of the keys.
    if value > plain + rotated {
        let most = format!("up to {}", plain + rotated);
        return Err(config.unsupported("v_head_dim", &value.into(), &most));
    }
    config.only("qk_head_dim", &json!(plain + rotated))?;
    // Absent is another width than `null`, which means that queries have no latent form.
    let query = match config.optional("q_lora_rank", DIMENSION_MAX)? {
        None if !config.has("q_lora_rank") => Some(1536),
        rank => rank,
    };
    let interleaved = match third {
        true => config.flag("rope_interleave", true)?,
        false => true,
    };
    let mut scale = ((plain + rotated) as f64).powf(-0.5);
    if let RopeScaling::Yarn { factor, .. } = rope.scaling {
        // The number itself was checked with the rope's other parameters.
        let sets = ["rope_scaling", "rope_parameters"].map(|key| config.get(key));
        let all = sets.into_iter().flatten().find_map(|set| set.get("mscale_all_dim"));
        if let Some(all) = all.and_then(Value::as_f64).filter(|_| factor > 1.0) {
            scale *= (0.1 * all * factor.ln() + 1.0).powi(2);
        }
    }
    let latent = Latent {
        heads,
        plain,
        rotated,
        value,
        query,
        rank: config.optional("kv_lora_rank", DIMENSION_MAX)?.unwrap_or(512),
        scale: scale as f32,
        interleaved,
    };
    Ok((rope, latent))
}

fn experts(config: &Config<'_>, third: bool) -> Result<(Experts, Option<Shared>), FamilyError> {
    let activation = config.activation()?;
    let count =
        config.optional("n_routed_experts", COUNT_MAX)?.unwrap_or(if third { 256 } else { 64 });
    let top_k = config.required("num_experts_per_tok", count)?;
    let ff = config.required("moe_intermediate_size", DIMENSION_MAX)?;
    let (scoring, method) = match third {
        true => ("sigmoid", "noaux_tc"),
        false => ("softmax", "greedy"),
    };
    config.only("scoring_func", &json!(scoring))?;
    config.only("topk_method", &json!(method))?;
    let scale = config.positive("routed_scaling_factor", 1.0)? as f32;
    let renormalise = config.flag("norm_topk_prob", third)?;
    if !third {
        // Groups matter to another `topk_method` only, which is refused.
        config.skip(&["n_group", "topk_group"]);
    }
    let scoring = match third {
        true => groups::scoring(config, (count, top_k), (8, 4), (renormalise, scale))?,
        // Transformers never renormalises those of V2, other implementations do.
        false if renormalise => {
            return Err(config.unsupported("norm_topk_prob", &true.into(), "false"));
        }
        false if scale == 1.0 => Scoring::Softmax { renormalise: false },
        false => {
            return Err(config.unsupported("routed_scaling_factor", &f64::from(scale).into(), "1"));
        }
    };
    let bias = third.then_some("mlp.gate.e_score_correction_bias");
    let experts = Experts { bias, ..Experts::plain(count, top_k, ff, activation, scoring) };
    let width = ff * config.count("n_shared_experts", if third { 1 } else { 2 }, COUNT_MAX)?;
    Ok((experts, Shared::plain(width, activation)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Kv, Op, Scoring};

    fn config(more: Value) -> Value {
        let mut config = json!({
            "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 99, "max_position_embeddings": 512,
            "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 3,
            "moe_intermediate_size": 40, "n_group": 3, "topk_group": 2, "q_lora_rank": 24,
            "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "routed_scaling_factor": 2.5, "norm_topk_prob": true,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn keys_and_values_come_from_one_latent_row_and_groups_limit_the_choice() {
        let graph = read(&config(json!({}))).unwrap().graph;
        assert_eq!(graph.kv, [Kv { kv_heads: 4, head_dim: 20 }; 3]);
        assert_eq!((graph.moe.len(), graph.moe[0].layer), (2, 1));
        let grouped = Scoring::Grouped { renormalise: true, scale: 2.5, groups: 3, kept: 2 };
        let route = |op: &&Op| matches!(op, Op::Route { scoring, bias: Some(_), .. } if *scoring == grouped);
        assert_eq!(graph.ops.iter().filter(route).count(), 2);
        let rows = |name: &str| {
            let name = format!("model.layers.0.self_attn.{name}.weight");
            graph.weights.iter().find(|weight| weight.tensor == name).map(|weight| weight.rows)
        };
        assert_eq!(
            ["q_a_proj", "q_b_proj", "latent_proj", "k_rope_proj", "k_b_proj", "v_b_proj"]
                .map(rows),
            [24, 80, 32, 8, 48, 64].map(Some)
        );
        let plain = read(&config(json!({ "q_lora_rank": null }))).unwrap().graph;
        assert!(plain.weights.iter().any(|w| w.tensor == "model.layers.0.self_attn.q_proj.weight"));
    }

    #[test]
    fn a_scaled_rope_scales_the_scores_twice() {
        let scale = |config| {
            let graph = read(&config).unwrap().graph;
            graph.ops.iter().find_map(|op| match op {
                Op::Attention { scale, .. } => Some(f64::from(*scale)),
                _ => None,
            })
        };
        let yarn = json!({ "type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64 });
        let plain = scale(config(json!({}))).unwrap();
        assert!((plain - 20_f64.powf(-0.5)).abs() < 1e-7);
        let scaled = scale(config(json!({ "rope_scaling": yarn }))).unwrap();
        let factor = (0.1 * 40_f64.ln() + 1.0).powi(2);
        assert!((scaled / plain - factor).abs() < 1e-6, "{scaled} {plain}");
    }

    #[test]
    fn other_routings_and_shapes_are_refused_by_name() {
        for (key, value) in [
            ("n_group", json!(5)),
            ("n_group", json!(12)),
            ("topk_group", json!(4)),
            ("scoring_func", json!("softmax")),
            ("topk_method", json!("group_limited_greedy")),
            ("moe_layer_freq", json!(2)),
            ("v_head_dim", json!(24)),
            ("qk_rope_head_dim", json!(7)),
            ("attention_bias", json!(true)),
            ("num_experts_per_tok", json!(9)),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
