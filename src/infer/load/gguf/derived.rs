//! More architectures' configs: those with other experts than Mixtral's, Granite's and SmolLM3's.
//!
//! What llama.cpp derives from the architecture is written out, as in `config`.

use serde_json::{Map, Value as Json, json};

use super::config::{Facts, entries, head_dim, whole_heads};
use super::header::Value;
use super::keys::Keys;

type Result<T> = std::result::Result<T, String>;

/// What is common to all experts: a count, and how many are used.
fn experts(keys: &Keys<'_>) -> Result<(u64, u64)> {
    Ok((keys.needed("expert_count")?, keys.needed("expert_used_count")?))
}

/// Sigmoids of each expert's own score (`LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID`).
fn sigmoid(keys: &Keys<'_>) -> Result<()> {
    keys.only("expert_gating_func", &Value::Integer(2))
}

/// A part of each head rotates.
fn rotated(keys: &Keys<'_>) -> Result<u64> {
    Ok(keys.number("rope.dimension_count")?.unwrap_or(head_dim(keys)?))
}

/// Experts in all layers, weighed by the softmax over all (`llm_build_qwen2moe`), and one that is
/// gated beside them.
pub fn qwen2_moe(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    keys.only("expert_gating_func", &Value::Integer(1))?;
    keys.only("expert_weights_norm", &Value::Bool(false))?;
    let (count, used) = experts(keys)?;
    let width = keys.needed("expert_feed_forward_length")?;
    Ok(entries(json!({
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": keys.number("feed_forward_length")?.unwrap_or(width),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": keys.needed("expert_shared_feed_forward_length")?,
        "num_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": false,
    })))
}

/// Experts in all layers, weighed by the softmax over all (`llm_build_olmoe`).
pub fn olmoe(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    keys.only("expert_gating_func", &Value::Integer(1))?;
    keys.only("expert_weights_norm", &Value::Bool(false))?;
    let (count, used) = experts(keys)?;
    Ok(entries(json!({
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "attention_bias": facts.biased,
        "num_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": false,
    })))
}

/// Layers that predict further tokens are counted among the blocks; there must be none.
pub fn glm4_moe(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    sigmoid(keys)?;
    keys.only("nextn_predict_layers", &Value::Integer(0))?;
    let (count, used) = experts(keys)?;
    Ok(entries(json!({
        "architectures": ["Glm4MoeForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "moe_intermediate_size": keys.needed("expert_feed_forward_length")?,
        "attention_bias": facts.biased,
        "use_qk_norm": facts.normed,
        "first_k_dense_replace": keys.count("leading_dense_block_count")?,
        "n_routed_experts": count,
        "n_shared_experts": keys.count("expert_shared_count")?,
        "num_experts_per_tok": used,
        "norm_topk_prob": keys.flag("expert_weights_norm")?.unwrap_or(false),
        "routed_scaling_factor": keys.float("expert_weights_scale")?.unwrap_or(1.0),
        "partial_rotary_factor": rotated(keys)? as f64 / head_dim(keys)? as f64,
    })))
}

/// Experts by softmax, renormalised (`llm_build_ernie4_5_moe`).
pub fn ernie4_5_moe(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    keys.only("expert_gating_func", &Value::Integer(1))?;
    let (count, used) = experts(keys)?;
    // The converter divides another width by the number of heads; the tensors have the true one.
    keys.number("expert_shared_feed_forward_length")?;
    Ok(entries(json!({
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "moe_intermediate_size": keys.needed("expert_feed_forward_length")?,
        "moe_num_experts": count,
        "moe_k": used,
        "moe_num_shared_experts": keys.count("expert_shared_count")?,
        "moe_layer_start_index": keys.count("leading_dense_block_count")?,
        "moe_layer_interval": keys.number("interleave_moe_layer_step")?.unwrap_or(1),
    })))
}

/// Experts in all layers by sigmoids, renormalised (`llm_build_minimax_m2`).
pub fn minimax_m2(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    sigmoid(keys)?;
    let (count, used) = experts(keys)?;
    keys.number("feed_forward_length")?;
    Ok(entries(json!({
        "architectures": ["MiniMaxM2ForCausalLM"],
        "intermediate_size": keys.needed("expert_feed_forward_length")?,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "rotary_dim": rotated(keys)?,
    })))
}

/// Every second layer sees all positions (`LLM_ARCH_OPENAI_MOE` in `llama_model::load_hparams`).
pub fn gpt_oss(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    // Softmax of the chosen ones (`LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT`).
    keys.only("expert_gating_func", &Value::Integer(3))?;
    let (count, used) = experts(keys)?;
    let dense = keys.number("feed_forward_length")?;
    let width = keys.number("expert_feed_forward_length")?.or(dense);
    Ok(entries(json!({
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": width.ok_or("expert_feed_forward_length is missing")?,
        "attention_bias": facts.biased,
        "sliding_window": keys.needed("attention.sliding_window")?,
        "num_local_experts": count,
        "num_experts_per_tok": used,
    })))
}

/// OLMo 2, or OLMo 3 if there is a window: then every fourth layer sees all positions, and only the
/// rope of these is scaled (`LLM_ARCH_OLMO2` in `llama_model::load_hparams`). Without a window, OLMo 3
/// is OLMo 2.
pub fn olmo2(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    let layers = keys.needed("block_count")?;
    let window = keys.number("attention.sliding_window")?;
    let sliding: Vec<bool> = match keys.get("attention.sliding_window_pattern") {
        None => (1..=layers).map(|layer| window.is_some() && !layer.is_multiple_of(4)).collect(),
        Some(Value::Bools(list)) if list.len() as u64 == layers => list.clone(),
        Some(other) => {
            let kind = other.kind();
            return Err(format!(
                "olmo2.attention.sliding_window_pattern is {kind}, expected one for each of {layers} layers"
            ));
        }
    };
    let name = |sliding: &bool| if *sliding { "sliding_attention" } else { "full_attention" };
    Ok(entries(json!({
        "architectures": ["Olmo3ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "attention_bias": facts.biased,
        "sliding_window": window,
        "layer_types": sliding.iter().map(name).collect::<Vec<_>>(),
    })))
}

/// Granite 3, dense.
pub fn granite(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    let mut config = multipliers(keys)?;
    config.insert("architectures".into(), json!(["GraniteForCausalLM"]));
    config.insert("attention_bias".into(), facts.biased.into());
    Ok(config)
}

/// Granite 3 with experts, without shared ones.
pub fn granite_moe(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    let mut config = granite(keys, facts)?;
    keys.only("expert_gating_func", &Value::Integer(1))?;
    let (count, used) = experts(keys)?;
    config.insert("architectures".into(), json!(["GraniteMoeForCausalLM"]));
    config.insert("num_local_experts".into(), count.into());
    config.insert("num_experts_per_tok".into(), used.into());
    Ok(config)
}

fn multipliers(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    let attention = keys.float("attention.scale")?.ok_or("attention.scale is missing")?;
    Ok(entries(json!({
        "intermediate_size": keys.needed("feed_forward_length")?,
        "attention_multiplier": attention,
        "embedding_multiplier": keys.float("embedding_scale")?.unwrap_or(1.0),
        "residual_multiplier": keys.float("residual_scale")?.unwrap_or(1.0),
        "logits_scaling": keys.float("logit_scale")?.unwrap_or(1.0),
    })))
}

/// Every fourth layer does not rotate (`n_no_rope_layer_step` in `llama_model::load_hparams`).
pub fn smollm3(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    Ok(entries(json!({
        "architectures": ["SmolLM3ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "attention_bias": facts.biased,
        "no_rope_layer_interval": 4,
    })))
}
