//! What a model is, in RDRR's words: `architecture`, `moeConfig`, `inference`.
//!
//! For readers of RDRR other than this one. The engine here reads the Hugging
//! Face config that the manifest also carries, which says everything.

use serde_json::{Value, json};

use crate::families::{RopeScaling, Spec};
use crate::graph::Activation;
use doppler_store::manifest::{Architecture, MoeConfig};

pub fn architecture(spec: &Spec) -> Architecture {
    Architecture {
        num_layers: Some(spec.layers as u64),
        hidden_size: Some(spec.hidden as u64),
        intermediate_size: Some(spec.ff as u64),
        num_attention_heads: Some(spec.heads as u64),
        num_key_value_heads: Some(spec.kv_heads as u64),
        head_dim: Some(spec.head_dim as u64),
        vocab_size: Some(spec.vocab as u64),
        max_seq_len: Some(spec.context_max as u64),
    }
}

pub fn moe_config(spec: &Spec) -> Option<MoeConfig> {
    spec.moe.as_ref().map(|moe| MoeConfig {
        num_experts: moe.experts as u64,
        num_experts_per_token: moe.top_k as u64,
        // Each expert's gate, up and down a tensor of its own.
        expert_format: Some("mixtral".into()),
        expert_intermediate_size: Some(moe.ff as u64),
    })
}

pub fn inference(spec: &Spec) -> Value {
    let window = spec.windows.iter().flatten().next();
    json!({
        "attention": {
            "slidingWindow": window,
            "queryKeyNorm": spec.qk_norm,
            "causal": true,
            "attentionBias": spec.attention_bias,
        },
        "normalization": {
            "rmsNormEps": shortest(spec.rms_eps),
            "rmsNormWeightOffset": false,
            "postAttentionNorm": true,
            "preFeedforwardNorm": false,
            "postFeedforwardNorm": false,
        },
        "ffn": {
            "activation": match spec.activation {
                Activation::Silu => "silu",
                Activation::GeluTanh => "gelu",
            },
            "gatedActivation": true,
        },
        "rope": rope(spec),
        "output": { "tieWordEmbeddings": spec.tie_word_embeddings, "scaleEmbeddings": false },
        "layerPattern": layer_pattern(spec),
    })
}

fn rope(spec: &Spec) -> Value {
    let (kind, factor) = match spec.rope.scaling {
        RopeScaling::None => (None, 1.0),
        RopeScaling::Linear { factor } => (Some("linear"), factor),
        RopeScaling::Llama3 { factor, .. } => (Some("llama3"), factor),
    };
    json!({
        "ropeTheta": spec.rope.theta,
        "ropeInterleaved": false,
        "ropeScalingType": kind,
        "ropeScalingFactor": factor,
    })
}

fn layer_pattern(spec: &Spec) -> Value {
    if spec.windows.iter().all(Option::is_none) {
        return Value::Null;
    }
    let kind = |window: &Option<usize>| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    json!({ "type": "custom", "layerTypes": spec.windows.iter().map(kind).collect::<Vec<_>>() })
}

/// The f32 as the decimal number a person wrote (1e-6, not 9.999999974752427e-7).
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
