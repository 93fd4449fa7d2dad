//! Describes a model in RDRR's terms: `architecture`, `moeConfig`, `inference`.
//!
//! For other readers of RDRR. The engine here reads the Hugging Face config, which the manifest
//! also contains and which says everything. The description is derived from the graph, so a family
//! has nothing to add here.

use serde_json::{Value, json};

use crate::families::Described;
use crate::graph::{Activation, Graph, Op, WeightRole};
use doppler_store::manifest::{Architecture, MoeConfig};

/// `config` is the model's own. It gives the width of a dense feed-forward, even if no layer has
/// one.
pub fn architecture(graph: &Graph, config: &Value) -> Architecture {
    let attention = graph.ops.iter().find_map(|op| match op {
        Op::Attention { kv, heads, .. }
        | Op::AttendChunk { kv, heads, .. }
        | Op::AttendSinks { kv, heads, .. } => Some((*heads as u64, graph.kv_spec(*kv))),
        _ => None,
    });
    let hidden = graph.ops.iter().find_map(|op| match op {
        Op::Embed { out, .. } => Some(graph.width(*out) as u64),
        _ => None,
    });
    Architecture {
        num_layers: Some(graph.layers as u64),
        hidden_size: hidden,
        intermediate_size: config.get("intermediate_size").and_then(Value::as_u64),
        num_attention_heads: attention.map(|(heads, _)| heads),
        num_key_value_heads: attention.map(|(_, kv)| kv.kv_heads as u64),
        head_dim: attention.map(|(_, kv)| kv.head_dim as u64),
        vocab_size: Some(graph.vocab as u64),
        max_seq_len: Some(graph.context_max as u64),
    }
}

pub fn moe_config(graph: &Graph) -> Option<MoeConfig> {
    graph.moe.first().map(|moe| MoeConfig {
        num_experts: moe.experts.len() as u64,
        num_experts_per_token: moe.top_k as u64,
        // Each expert's gate, up and down are separate tensors.
        expert_format: Some("mixtral".into()),
        expert_intermediate_size: Some(moe.ff as u64),
    })
}

pub fn inference(model: &Described) -> Value {
    let graph = &model.graph;
    let windows = windows(graph);
    let ops = || graph.ops.iter();
    let eps = ops().find_map(|op| match op {
        Op::RmsNorm { eps, .. } | Op::LayerNorm { eps, .. } => Some(shortest(*eps)),
        _ => None,
    });
    let dense = ops().find_map(|op| match op {
        // The sigmoid gates the output of an attention.
        Op::Gated { activation: Activation::Sigmoid, .. } => None,
        Op::Gated { activation, .. } | Op::Activate { activation, .. } => Some(*activation),
        _ => None,
    });
    let gated = ops().any(|op| matches!(op, Op::Gated { .. })) || !graph.moe.is_empty();
    let activation = dense.or_else(|| graph.moe.first().map(|moe| moe.activation));
    let biased = |op: &Op| {
        matches!(op, Op::Linear { weight, bias: Some(_), .. }
            if graph.weight_spec(*weight).role == WeightRole::Query)
    };
    let has = |norm: &str| {
        let end = format!(".{norm}.weight");
        graph.weights.iter().any(|weight| weight.tensor.ends_with(&end))
    };
    json!({
        "attention": {
            "slidingWindow": windows.iter().flatten().next(),
            // Norms of heads work in place; norms of states do not.
            "queryKeyNorm": ops().any(|op| matches!(op, Op::RmsNorm { x, out, .. } if x == out)),
            "causal": graph.causal(),
            "attentionBias": ops().any(biased),
        },
        "normalization": {
            "rmsNormEps": eps,
            "rmsNormWeightOffset": false,
            "postAttentionNorm": has("post_attention_layernorm"),
            "preFeedforwardNorm": has("pre_feedforward_layernorm"),
            "postFeedforwardNorm": has("post_feedforward_layernorm"),
        },
        "ffn": {
            "activation": match activation {
                Some(Activation::GeluTanh | Activation::Gelu) => "gelu",
                Some(Activation::SquaredRelu) => "relu2",
                Some(Activation::Tanh) => "tanh",
                Some(Activation::Silu | Activation::Sigmoid | Activation::Clamped) | None => "silu",
            },
            "gatedActivation": gated,
        },
        "rope": rope(model),
        "output": {
            "tieWordEmbeddings": graph.tied(),
            "scaleEmbeddings": ops().any(|op| matches!(op, Op::Embed { scale, .. } if *scale != 1.0)),
        },
        "layerPattern": layer_pattern(&windows),
    })
}

/// If sliding layers have a rope of their own, it is the second one.
fn rope(model: &Described) -> Value {
    let rope = model.ropes.first();
    let mut described = json!({
        "ropeTheta": rope.map(|rope| rope.theta),
        "ropeInterleaved": false,
        "ropeScalingType": rope.and_then(|rope| rope.scaling.name()),
        "ropeScalingFactor": rope.map(|rope| rope.scaling.factor()),
    });
    // Only where there is one, so that models converted before have the same id.
    if let Some(local) = model.ropes.get(1) {
        described["ropeLocalTheta"] = local.theta.into();
    }
    described
}

/// The window of each attention layer.
fn windows(graph: &Graph) -> Vec<Option<usize>> {
    let windows = graph.ops.iter().filter_map(|op| match op {
        Op::Attention { window, .. } | Op::AttendSinks { window, .. } => Some(*window),
        _ => None,
    });
    windows.collect()
}

fn layer_pattern(windows: &[Option<usize>]) -> Value {
    if windows.iter().all(Option::is_none) {
        return Value::Null;
    }
    let kind = |window: &Option<usize>| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    json!({ "type": "custom", "layerTypes": windows.iter().map(kind).collect::<Vec<_>>() })
}

/// The f32 as the decimal number that a person wrote (1e-6, not 9.999999974752427e-7).
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
