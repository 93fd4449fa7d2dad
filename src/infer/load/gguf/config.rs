//! Metadata to the config that Hugging Face would write, for the architectures whose family exists.
//!
//! llama.cpp derives some parameters from the architecture instead of storing them; they are
//! written out here, with the place in llama.cpp that says so. Everything else is stated by the
//! file, and what is not understood is refused (`keys`).

use serde_json::{Map, Value as Json, json};

use super::derived;
use super::header::Value;
use super::keys::Keys;

type Result<T> = std::result::Result<T, String>;

/// How llama.cpp's names and layouts differ from Hugging Face's, for one architecture.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// Queries and keys are stored for rotation of neighbouring elements (`LLAMA_ROPE_TYPE_NORM`).
    pub interleaved: bool,
    /// Norms are stored with the 1 that Hugging Face's checkpoints lack.
    pub baked_norms: bool,
    /// There are norms after each sub-block, too.
    pub sandwich: bool,
    /// YaRN's ramp begins and ends between frequencies. llama.cpp rounds its ends for every
    /// architecture; the makers' code, with which the model was trained, does not.
    pub yarn_between: bool,
    family: fn(&Keys<'_>, &Facts) -> Result<Map<String, Json>>,
}

const PLAIN: Architecture = Architecture {
    name: "",
    interleaved: false,
    baked_norms: false,
    sandwich: false,
    yarn_between: false,
    family: |_, _| Ok(Map::new()),
};

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", interleaved: true, family: llama, ..PLAIN },
    Architecture { name: "qwen2", family: qwen2, ..PLAIN },
    Architecture { name: "qwen3", family: qwen3, ..PLAIN },
    Architecture { name: "qwen3moe", family: qwen3_moe, ..PLAIN },
    Architecture { name: "gemma2", baked_norms: true, sandwich: true, family: gemma2, ..PLAIN },
    Architecture { name: "gemma3", baked_norms: true, sandwich: true, family: gemma3, ..PLAIN },
    Architecture { name: "phi3", family: phi3, ..PLAIN },
    Architecture { name: "smollm3", interleaved: true, family: derived::smollm3, ..PLAIN },
    Architecture { name: "granite", interleaved: true, family: derived::granite, ..PLAIN },
    Architecture { name: "granitemoe", interleaved: true, family: derived::granite_moe, ..PLAIN },
    Architecture { name: "qwen2moe", family: derived::qwen2_moe, ..PLAIN },
    Architecture { name: "olmoe", family: derived::olmoe, ..PLAIN },
    // Its one norm per sub-block has the name that it has where there are two; so in gpt-oss.
    Architecture { name: "glm4moe", sandwich: true, family: derived::glm4_moe, ..PLAIN },
    // Neighbouring elements rotate in Hugging Face's checkpoints, too.
    Architecture { name: "ernie4_5-moe", family: derived::ernie4_5_moe, ..PLAIN },
    Architecture { name: "minimax-m2", family: derived::minimax_m2, ..PLAIN },
    Architecture { name: "olmo2", sandwich: true, family: derived::olmo2, ..PLAIN },
    Architecture {
        name: "gpt-oss",
        sandwich: true,
        yarn_between: true,
        family: derived::gpt_oss,
        ..PLAIN
    },
];

/// What the tensors say.
pub struct Facts {
    /// Rows of the embedding table.
    pub vocab: u64,
    /// There is no output matrix.
    pub tied: bool,
    /// Queries have a bias.
    pub biased: bool,
    /// Queries have a norm.
    pub normed: bool,
    /// `rope_freqs.weight`: what each frequency is divided by.
    pub divisors: Option<Vec<f32>>,
}

/// Finds the architecture.
///
/// # Errors
/// If it is missing or unknown.
pub fn architecture(name: Option<&Value>) -> Result<&'static Architecture> {
    let known = || ARCHITECTURES.iter().map(|known| known.name).collect::<Vec<_>>().join(", ");
    let Some(name) = name else {
        return Err("general.architecture is missing".into());
    };
    let found =
        ARCHITECTURES.iter().find(|known| matches!(name, Value::String(n) if n == known.name));
    found.ok_or_else(|| format!("unknown architecture {} (known: {})", name.kind(), known()))
}

/// A head's width, which is that of its rotated part except in phi3.
pub fn head_dim(keys: &Keys<'_>) -> Result<u64> {
    let (hidden, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let width = match keys.number("attention.key_length")? {
        Some(width) => width,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(format!("{hidden} is not a multiple of {heads} heads")),
    };
    match keys.number("attention.value_length")?.is_none_or(|values| values == width) {
        true => Ok(width),
        false => Err(format!("values are not as wide as keys ({width}), which is not supported")),
    }
}

/// The config.
///
/// # Errors
/// If a key is missing, out of bounds, or not understood.
pub fn config(of: &Architecture, keys: &Keys<'_>, facts: &Facts) -> Result<Json> {
    let heads = keys.needed("attention.head_count")?;
    let mut config = json!({
        "hidden_size": keys.needed("embedding_length")?,
        "num_hidden_layers": keys.needed("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim(keys)?,
        "vocab_size": facts.vocab,
        "max_position_embeddings": keys.needed("context_length")?,
        "rms_norm_eps": keys.float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| format!("{}.attention.layer_norm_rms_epsilon is missing", of.name))?,
        "rope_theta": keys.float("rope.freq_base")?.unwrap_or(10_000.0),
        "tie_word_embeddings": facts.tied,
    });
    let own = (of.family)(keys, facts)?;
    let map = config.as_object_mut().expect("an object");
    map.extend(own);
    if let Some(mut scaling) = scaling(keys, facts)? {
        if of.yarn_between {
            scaling["truncate"] = false.into();
        }
        map.insert("rope_scaling".into(), scaling);
    }
    keys.all_read()?;
    Ok(config)
}

fn scaling(keys: &Keys<'_>, facts: &Facts) -> Result<Option<Json>> {
    let factor = keys.float("rope.scaling.factor")?;
    // An older name of a linear factor.
    let linear = keys.float("rope.scale_linear")?;
    let original = keys.number("rope.scaling.original_context_length")?;
    let kind = keys.text("rope.scaling.type")?.unwrap_or(match factor.or(linear) {
        Some(_) => "linear",
        None => "none",
    });
    if let Some(divisors) = &facts.divisors {
        if kind != "none" {
            return Err(format!("both rope_freqs.weight and rope scaling {kind:?}"));
        }
        let head_dim = head_dim(keys)?;
        if divisors.len() as u64 != head_dim / 2 {
            return Err(format!(
                "tensor \"rope_freqs.weight\": {} values, expected {} (half of a head)",
                divisors.len(),
                head_dim / 2
            ));
        }
        return Ok(Some(json!({ "rope_type": "divisors", "divisors": divisors })));
    }
    let needed = || factor.or(linear).ok_or("rope.scaling.factor is missing".to_owned());
    match kind {
        "none" => Ok(None),
        "linear" => Ok(Some(json!({ "rope_type": "linear", "factor": needed()? }))),
        // The attention factor 0.1 ln(factor) + 1 is YaRN's default there and here.
        "yarn" => {
            let mut yarn = json!({ "rope_type": "yarn", "factor": needed()? });
            if let Some(original) = original {
                yarn["original_max_position_embeddings"] = original.into();
            }
            // Converters write the makers' whole factor.
            if let Some(factor) = keys.float("rope.scaling.attn_factor")? {
                yarn["attention_factor"] = factor.into();
            }
            Ok(Some(yarn))
        }
        other => Err(format!("rope scaling {other:?} is not supported (linear, yarn)")),
    }
}

/// An architecture without partial rotation.
pub fn whole_heads(keys: &Keys<'_>) -> Result<()> {
    let (rotated, width) = (keys.number("rope.dimension_count")?, head_dim(keys)?);
    match rotated.is_none_or(|rotated| rotated == width) {
        true => Ok(()),
        false => Err(format!("heads of {width} of which only a part rotates are not supported")),
    }
}

/// The entries of an object.
pub fn entries(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

/// Softmax routing whose chosen weights are renormalised, without shared experts.
fn usual_routing(keys: &Keys<'_>) -> Result<()> {
    keys.only("expert_gating_func", &Value::Integer(1))?;
    keys.only("expert_weights_norm", &Value::Bool(true))?;
    keys.only("expert_weights_scale", &Value::Float(1.0))?;
    keys.only("expert_shared_count", &Value::Integer(0))?;
    keys.only("leading_dense_block_count", &Value::Integer(0))
}

/// Llama and Mistral, or Mixtral if there are experts.
fn llama(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    let width = keys.needed("feed_forward_length")?;
    let experts = match keys.get("expert_count") {
        // Dense models state a count of 0.
        Some(Value::Integer(0)) | None => None,
        Some(_) => keys.number("expert_count")?,
    };
    let Some(experts) = experts else {
        keys.only("expert_used_count", &Value::Integer(0))?;
        return Ok(entries(json!({
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": width,
            "attention_bias": facts.biased,
        })));
    };
    usual_routing(keys)?;
    Ok(entries(json!({
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": width,
        "num_local_experts": experts,
        "num_experts_per_tok": keys.needed("expert_used_count")?,
    })))
}

fn qwen2(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    Ok(entries(json!({
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
    })))
}

fn qwen3(keys: &Keys<'_>, facts: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    Ok(entries(json!({
        "architectures": ["Qwen3ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "attention_bias": facts.biased,
    })))
}

/// Experts in all layers, chosen weights renormalised (`llm_build_qwen3moe`).
fn qwen3_moe(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    usual_routing(keys)?;
    let width = keys.needed("expert_feed_forward_length")?;
    Ok(entries(json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": keys.number("feed_forward_length")?.unwrap_or(width),
        "moe_intermediate_size": width,
        "num_experts": keys.needed("expert_count")?,
        "num_experts_per_tok": keys.needed("expert_used_count")?,
        "norm_topk_prob": true,
    })))
}

/// Every second layer sees all positions. Scores are scaled by a head's width, or in the 27B model by
/// the state's width over the number of heads (`LLM_ARCH_GEMMA2` in `llama_model::load_hparams`).
fn gemma2(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    let (hidden, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let scalar = match keys.needed("block_count")? {
        46 => hidden / heads,
        _ => head_dim(keys)?,
    };
    Ok(entries(json!({
        "architectures": ["Gemma2ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.number("attention.sliding_window")?.unwrap_or(4096),
        "attn_logit_softcapping": keys.float("attn_logit_softcapping")?.unwrap_or(50.0),
        "final_logit_softcapping": keys.float("final_logit_softcapping")?.unwrap_or(30.0),
    })))
}

/// Every sixth layer sees all positions, the others rotate with the base 10,000, and scores are
/// scaled by a head's width, or in the 27B model by the state's width over the number of heads
/// (`LLM_ARCH_GEMMA3` in `llama_model::load_hparams`).
fn gemma3(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    whole_heads(keys)?;
    let (hidden, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let scalar = match keys.needed("block_count")? {
        62 => hidden / heads,
        _ => head_dim(keys)?,
    };
    let mut config = entries(json!({
        "architectures": ["Gemma3ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.needed("attention.sliding_window")?,
        "sliding_window_pattern": keys.number("attention.sliding_window_pattern")?.unwrap_or(6),
        "rope_local_base_freq": keys.float("rope.freq_base_swa")?.unwrap_or(10_000.0),
    }));
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = keys.float(key)?.filter(|cap| *cap != 0.0) {
            config.insert(key.into(), cap.into());
        }
    }
    Ok(config)
}

fn phi3(keys: &Keys<'_>, _: &Facts) -> Result<Map<String, Json>> {
    let width = head_dim(keys)?;
    let rotated = keys.number("rope.dimension_count")?.unwrap_or(width);
    let original = keys.number("rope.scaling.original_context_length")?;
    let context = keys.needed("context_length")?;
    if original.is_some_and(|original| original != context) {
        return Err(format!(
            "phi3 with longrope (context {context}, originally {}) is not supported",
            original.unwrap_or(context)
        ));
    }
    Ok(entries(json!({
        "architectures": ["Phi3ForCausalLM"],
        "intermediate_size": keys.needed("feed_forward_length")?,
        "partial_rotary_factor": rotated as f64 / width as f64,
        "sliding_window": keys.number("attention.sliding_window")?,
    })))
}
