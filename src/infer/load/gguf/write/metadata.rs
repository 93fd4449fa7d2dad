//! A config as llama.cpp's metadata: the inverse of `gguf/config`.
//!
//! Only what a config of these architectures usually says is written. Whether that is all is found out
//! by reading it back ([`difference`]).

use serde_json::Value as Json;

use super::super::config::{self, Architecture};
use super::super::header::Value;
use super::Checkpoint;
use super::bytes::Meta;
use crate::graph::{Graph, Rope};
use crate::load::mixture::Quantization;
use doppler_store::DType;

/// Architectures of configs, and llama.cpp's.
const ARCHITECTURES: &[(&str, &str)] = &[
    ("LlamaForCausalLM", "llama"),
    ("MistralForCausalLM", "llama"),
    ("MixtralForCausalLM", "llama"),
    ("Qwen2ForCausalLM", "qwen2"),
    ("Qwen3ForCausalLM", "qwen3"),
    ("Qwen3MoeForCausalLM", "qwen3moe"),
    ("Gemma2ForCausalLM", "gemma2"),
    ("Gemma3ForCausalLM", "gemma3"),
];

/// Keys that are the same number in every config that has them. Llama.cpp's name, and the config's.
const NUMBERS: &[(&str, &str)] = &[
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("feed_forward_length", "intermediate_size"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_used_count", "num_experts_per_tok"),
    ("attention.sliding_window", "sliding_window"),
];
/// Floats likewise.
const FLOATS: &[(&str, &str)] = &[
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
];

pub(super) fn architecture(config: &Json) -> Result<&'static Architecture, String> {
    let name = config["architectures"][0].as_str().unwrap_or_default();
    let found = ARCHITECTURES.iter().find(|(known, _)| *known == name);
    let Some((_, known)) = found else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(known, _)| *known).collect();
        return Err(format!(
            "{name:?} cannot be written as GGUF yet (these can: {})",
            known.join(", ")
        ));
    };
    config::architecture(Some(&Value::String((*known).to_owned())))
}

/// The rope's base, wherever the config says it.
fn base(config: &Json) -> f64 {
    let new = &config["rope_parameters"];
    // Gemma 3 has one for each kind of layer; the file has the one of layers that see everything.
    let whole = [&new["full_attention"]["rope_theta"], &new["rope_theta"], &config["rope_theta"]];
    whole.into_iter().find_map(Json::as_f64).unwrap_or(10_000.0)
}

/// The rope's scaling, wherever the config says it.
fn scaling(config: &Json) -> &Json {
    [
        &config["rope_parameters"]["full_attention"],
        &config["rope_parameters"],
        &config["rope_scaling"],
    ]
    .into_iter()
    .find(|scaling| scaling.is_object())
    .unwrap_or(&Json::Null)
}

fn scaling_kind(config: &Json) -> &str {
    let scaling = scaling(config);
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
    kind.and_then(Json::as_str).unwrap_or("default")
}

/// `general` and the architecture's keys.
pub(super) fn keys(
    of: &Architecture,
    checkpoint: &dyn Checkpoint,
    graph: &Graph,
    quantization: Quantization,
) -> Result<Vec<(String, Meta)>, String> {
    let config = checkpoint.config();
    let word = |number: u64| u32::try_from(number).map(Meta::Number).map_err(|e| e.to_string());
    let mut keys = vec![
        ("general.architecture".to_owned(), Meta::Text(of.name.to_owned())),
        ("general.type".to_owned(), Meta::Text("model".to_owned())),
        ("general.name".to_owned(), Meta::Text(checkpoint.name())),
        ("general.quantization_version".to_owned(), Meta::Number(2)),
    ];
    if let Some(kind) = file_type(quantization) {
        keys.push(("general.file_type".to_owned(), Meta::Number(kind)));
    }
    let mut own = |key: &str, value: Meta| keys.push((format!("{}.{key}", of.name), value));
    for (key, from) in NUMBERS {
        if let Some(number) = config.get(*from).and_then(Json::as_u64) {
            // Qwen's configs have a window that is not used; reading back notices if it is.
            if *from != "sliding_window" || of.name.starts_with("gemma") {
                own(key, word(number)?);
            }
        }
    }
    for (key, from) in FLOATS {
        if let Some(number) = config.get(*from).and_then(Json::as_f64) {
            own(key, Meta::Float(number as f32));
        }
    }
    let kv = graph.kv.first().ok_or("it has no attention")?;
    own("attention.head_count_kv", word(kv.kv_heads as u64)?);
    own("attention.key_length", word(kv.head_dim as u64)?);
    own("attention.value_length", word(kv.head_dim as u64)?);
    own("rope.dimension_count", word(kv.head_dim as u64)?);
    own("vocab_size", word(graph.vocab as u64)?);
    own("rope.freq_base", Meta::Float(base(config) as f32));
    if let Some(moe) = graph.moe.first() {
        own("expert_count", word(moe.experts.len() as u64)?);
    }
    let scaling = scaling(config);
    let kind = scaling_kind(config);
    if let ("linear" | "yarn", Some(factor)) = (kind, scaling.get("factor").and_then(Json::as_f64))
    {
        own("rope.scaling.type", Meta::Text(kind.to_owned()));
        own("rope.scaling.factor", Meta::Float(factor as f32));
        let original = scaling.get("original_max_position_embeddings").and_then(Json::as_u64);
        if let Some(original) = original {
            own("rope.scaling.original_context_length", word(original)?);
        }
    }
    Ok(keys)
}

/// `llama_ftype` of a mixture, if it has one.
const fn file_type(quantization: Quantization) -> Option<u32> {
    match quantization {
        Quantization::Bf16 => Some(32),
        Quantization::Q4KM => Some(15),
        Quantization::Mxfp4Moe => Some(38),
        Quantization::Blocks(DType::Q8_0) => Some(7),
        Quantization::Blocks(DType::Q6K) => Some(18),
        Quantization::Blocks(DType::Q5K) => Some(16),
        Quantization::Blocks(DType::Q4K) => Some(14),
        Quantization::Blocks(DType::Q5_0) => Some(8),
        Quantization::Blocks(DType::Q4_1) => Some(3),
        Quantization::Blocks(_) | Quantization::Keep => None,
    }
}

/// What the frequencies are divided by, if the scaling is one that only this can say.
pub(super) fn divisors(of: &Architecture, config: &Json, graph: &Graph) -> Option<Vec<f32>> {
    // llama.cpp looks for them in Llamas alone.
    let divided = of.name == "llama" && ["llama3", "divisors"].contains(&scaling_kind(config));
    let (rope, base) = (graph.ropes.first().filter(|_| divided)?, base(config));
    let half = rope.inv_freq.len() as f64;
    let plain = |i: usize| base.powf(-(i as f64) / half);
    let divisor = |(i, freq): (usize, &f32)| (plain(i) / f64::from(*freq)) as f32;
    Some(rope.inv_freq.iter().enumerate().map(divisor).collect())
}

/// What differs between two graphs that should be the same. Frequencies may differ in rounding.
pub(super) fn difference(one: &Graph, other: &Graph) -> Option<&'static str> {
    let near = |a: &f32, b: &f32| (a - b).abs() <= 2e-6 * a.abs().max(b.abs());
    let same = |a: &Rope, b: &Rope| {
        near(&a.attention_factor, &b.attention_factor)
            && a.long == b.long
            && a.inv_freq.len() == b.inv_freq.len()
            && a.inv_freq.iter().zip(&b.inv_freq).all(|(a, b)| near(a, b))
    };
    let ropes = one.ropes.len() == other.ropes.len()
        && one.ropes.iter().zip(&other.ropes).all(|(a, b)| same(a, b));
    [
        (ropes, "how it rotates"),
        (one.weights == other.weights, "its weights"),
        (one.moe == other.moe, "its experts"),
        (one.kv == other.kv, "its caches"),
        (one.ops == other.ops, "what it computes"),
        (one.context_max == other.context_max, "its context"),
        (one.vocab == other.vocab && one.layers == other.layers, "its size"),
    ]
    .into_iter()
    .find_map(|(same, what)| (!same).then_some(what))
}
