//! The pieces a decoder block is built of, shared by the families.
//!
//! Pre-norm blocks with grouped-query attention and a gated feed-forward, dense
//! or of experts; what differs between families comes from [`Spec`] and from
//! the expert names ([`ExpertNames`]).

use super::{MoeSpec, Spec};
use crate::graph::{Buf, ExpertTensors, Graph, Kv, KvId, Moe, MoeId, Op, RopeId, Scoring};

/// How a family spells its router and experts, below `model.layers.L.`.
pub struct ExpertNames {
    /// The module: `mlp` or `block_sparse_moe`; its router is `MODULE.gate.weight`.
    pub module: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// Qwen's spelling, also that of a dense feed-forward.
pub const PROJ_NAMES: ExpertNames =
    ExpertNames { module: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };

/// The activations a step needs, each `[T, width]`.
struct Buffers {
    /// The residual stream.
    x: Buf,
    /// The normalised input of a sub-block.
    normed: Buf,
    /// What a sub-block adds to the stream.
    delta: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    attended: Buf,
}

/// The whole model: embedding, blocks, final norm, output matrix.
pub fn decoder(spec: &Spec, names: &ExpertNames) -> Graph {
    let mut graph = Graph { vocab: spec.vocab, context_max: spec.context_max, ..Graph::default() };
    let g = &mut graph;
    let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let bufs = Buffers {
        x: g.buffer("x", spec.hidden),
        normed: g.buffer("normed", spec.hidden),
        delta: g.buffer("delta", spec.hidden),
        q: g.buffer("q", q_width),
        k: g.buffer("k", kv_width),
        v: g.buffer("v", kv_width),
        attended: g.buffer("attended", q_width),
    };
    let dense = (0..spec.layers).any(|layer| !is_sparse(spec, layer));
    let gate_up = dense.then(|| (g.buffer("gate", spec.ff), g.buffer("up", spec.ff)));
    let router = spec.moe.as_ref().map(|moe| g.buffer("router", moe.experts));
    g.ropes.push(spec.rope.rope(spec.head_dim));

    let table = g.weight("model.embed_tokens.weight", spec.vocab, spec.hidden);
    g.ops.push(Op::Embed { table, out: bufs.x, scale: 1.0 });
    for layer in 0..spec.layers {
        attention(g, spec, &bufs, layer);
        norm(g, spec, bufs.x, bufs.normed, layer_name(layer, "post_attention_layernorm"));
        match (&spec.moe, router, gate_up) {
            (Some(moe), Some(router), _) if moe.sparse[layer] => {
                experts(g, spec, moe, &bufs, router, layer, names);
            }
            (_, _, Some((gate, up))) => feed_forward(g, spec, &bufs, gate, up, layer),
            _ => unreachable!("a dense layer has its buffers"),
        }
        g.ops.push(Op::Add { x: bufs.x, y: bufs.delta });
    }
    norm(g, spec, bufs.x, bufs.normed, "model.norm".into());
    let output = match spec.tie_word_embeddings {
        true => table,
        false => g.weight("lm_head.weight", spec.vocab, spec.hidden),
    };
    g.ops.push(Op::Logits { x: bufs.normed, weight: output });
    graph
}

fn is_sparse(spec: &Spec, layer: usize) -> bool {
    spec.moe.as_ref().is_some_and(|moe| moe.sparse[layer])
}

fn layer_name(layer: usize, rest: &str) -> String {
    format!("model.layers.{layer}.{rest}")
}

/// `out = rms_norm(x)` by the vector `NAME.weight`.
fn norm(g: &mut Graph, spec: &Spec, x: Buf, out: Buf, name: String) {
    let weight = g.weight(format!("{name}.weight"), 1, g.width(x));
    g.ops.push(Op::RmsNorm { x, weight, out, eps: spec.rms_eps });
}

/// `out = x . NAME.weight^T (+ NAME.bias)`.
fn linear(g: &mut Graph, x: Buf, out: Buf, name: &str, bias: bool) {
    let (rows, cols) = (g.width(out), g.width(x));
    let weight = g.weight(format!("{name}.weight"), rows, cols);
    let bias = bias.then(|| g.weight(format!("{name}.bias"), 1, rows));
    g.ops.push(Op::Linear { x, weight, bias, out });
}

/// Normalise, project, turn, remember, attend, project back, add.
fn attention(g: &mut Graph, spec: &Spec, bufs: &Buffers, layer: usize) {
    let name = |rest: &str| layer_name(layer, rest);
    let bias = spec.attention_bias;
    norm(g, spec, bufs.x, bufs.normed, name("input_layernorm"));
    linear(g, bufs.normed, bufs.q, &name("self_attn.q_proj"), bias);
    linear(g, bufs.normed, bufs.k, &name("self_attn.k_proj"), bias);
    linear(g, bufs.normed, bufs.v, &name("self_attn.v_proj"), bias);
    for (buf, norm, heads) in [
        (bufs.q, "self_attn.q_norm.weight", spec.heads),
        (bufs.k, "self_attn.k_norm.weight", spec.kv_heads),
    ] {
        if spec.qk_norm {
            let weight = g.weight(name(norm), 1, spec.head_dim);
            g.ops.push(Op::RmsNorm { x: buf, weight, out: buf, eps: spec.rms_eps });
        }
        g.ops.push(Op::Rope { x: buf, heads, head_dim: spec.head_dim, rope: RopeId(0) });
    }
    let kv = KvId(u16::try_from(g.kv.len()).expect("layers are bounded by the config"));
    g.kv.push(Kv { kv_heads: spec.kv_heads, head_dim: spec.head_dim });
    g.ops.push(Op::KvWrite { kv, k: bufs.k, v: bufs.v });
    g.ops.push(Op::Attention {
        kv,
        q: bufs.q,
        out: bufs.attended,
        heads: spec.heads,
        scale: (spec.head_dim as f32).powf(-0.5),
        window: spec.windows[layer],
    });
    linear(g, bufs.attended, bufs.delta, &name("self_attn.o_proj"), bias);
    g.ops.push(Op::Add { x: bufs.x, y: bufs.delta });
}

/// A dense gated feed-forward into `delta`.
fn feed_forward(g: &mut Graph, spec: &Spec, bufs: &Buffers, gate: Buf, up: Buf, layer: usize) {
    let name = |rest: &str| layer_name(layer, &format!("mlp.{rest}"));
    linear(g, bufs.normed, gate, &name("gate_proj"), spec.mlp_bias);
    linear(g, bufs.normed, up, &name("up_proj"), spec.mlp_bias);
    g.ops.push(Op::Gated { gate, up, out: gate, activation: spec.activation });
    linear(g, gate, bufs.delta, &name("down_proj"), spec.mlp_bias);
}

/// Router, choice and experts into `delta`.
fn experts(
    g: &mut Graph,
    spec: &Spec,
    moe: &MoeSpec,
    bufs: &Buffers,
    router: Buf,
    layer: usize,
    names: &ExpertNames,
) {
    let module = layer_name(layer, names.module);
    linear(g, bufs.normed, router, &format!("{module}.gate"), false);
    let id = MoeId(u16::try_from(g.moe.len()).expect("layers are bounded by the config"));
    let tensor = |expert: usize, part: &str| format!("{module}.experts.{expert}.{part}.weight");
    g.moe.push(Moe {
        layer,
        top_k: moe.top_k,
        hidden: spec.hidden,
        ff: moe.ff,
        activation: spec.activation,
        experts: (0..moe.experts)
            .map(|expert| ExpertTensors {
                gate: tensor(expert, names.gate),
                up: tensor(expert, names.up),
                down: tensor(expert, names.down),
            })
            .collect(),
    });
    let scoring = Scoring::Softmax { renormalise: moe.renormalise };
    g.ops.push(Op::Route { moe: id, logits: router, scoring });
    g.ops.push(Op::Experts { moe: id, x: bufs.normed, out: bufs.delta });
}
