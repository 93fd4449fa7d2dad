//! How a graph's weights are made from the tensors of a GGUF file.
//!
//! The family's recipe says how they are made from Hugging Face's tensors. Here names become
//! llama.cpp's, norms that are stored whole are not added to, experts are slices of stacks, and the
//! rows of queries and keys go back into the order of the halves that rotate together. A row is
//! whole blocks, so that order costs no precision.

use super::config::Architecture;
use crate::graph::{Weight, WeightRole};
use crate::source::Source;

/// The recipe for `weight`, in heads of `head_dim`.
pub fn source(of: &Architecture, head_dim: u64, weight: &Weight) -> Source {
    if let Some((layer, number)) = expert(&weight.tensor) {
        return expert_source(weight, layer, number);
    }
    if let Some(source) = expert_biases(&weight.tensor) {
        return source;
    }
    let source = rewrite(of, &weight.source, &weight.tensor);
    if !of.interleaved {
        return source;
    }
    let half = (head_dim / 2) as usize;
    let is = |end: &str| weight.tensor.ends_with(end);
    match weight.role {
        WeightRole::Query | WeightRole::Key => source.permute(half, 2),
        WeightRole::Bias if is("q_proj.bias") || is("k_proj.bias") => {
            source.transpose().permute(half, 2).transpose()
        }
        _ => source,
    }
}

/// The layer and the number of an expert, from its weight's name.
fn expert(name: &str) -> Option<(&str, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, rest) = rest.split_once(".experts.")?;
    Some((layer, rest.split_once('.')?.0.parse().ok()?))
}

/// A slice of a stack. Files of the first months have a tensor for each expert.
fn expert_source(weight: &Weight, layer: &str, number: usize) -> Source {
    let part = match weight.role {
        WeightRole::Gate => "gate",
        WeightRole::Up => "up",
        _ => "down",
    };
    let first = number * weight.rows;
    let stack = Source::stored(format!("blk.{layer}.ffn_{part}_exps.weight"));
    Source::FirstOf(vec![
        stack.rows(first..first + weight.rows),
        Source::stored(format!("blk.{layer}.ffn_{part}.{number}.weight")),
    ])
}

/// The biases of all experts of a layer in one row. Those of gates and ups are apart in the file and
/// take turns in the row.
fn expert_biases(name: &str) -> Option<Source> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let row = |part: &str| Source::stored(format!("blk.{layer}.ffn_{part}_exps.bias")).flat();
    match rest {
        "mlp.experts.down_proj_bias" => Some(row("down")),
        "mlp.experts.gate_up_proj_bias" => {
            Some(Source::Concatenate(vec![row("gate"), row("up")]).transpose().flat())
        }
        _ => None,
    }
}

fn rewrite(of: &Architecture, source: &Source, own: &str) -> Source {
    let inner = |source: &Source| Box::new(rewrite(of, source, own));
    let list = |sources: &[Source]| sources.iter().map(|source| rewrite(of, source, own)).collect();
    match source {
        Source::Ones => Source::Ones,
        Source::Itself => Source::Stored(name(of, own)),
        Source::Stored(stored) => Source::Stored(name(of, stored)),
        Source::AddOne(source) if of.baked_norms => rewrite(of, source, own),
        Source::Rows { of, take } => Source::Rows { of: inner(of), take: *take },
        Source::Cols { of, take } => Source::Cols { of: inner(of), take: *take },
        Source::Concatenate(sources) => Source::Concatenate(list(sources)),
        Source::Transpose(of) => Source::Transpose(inner(of)),
        Source::Permute { of, outer, inner: within } => {
            Source::Permute { of: inner(of), outer: *outer, inner: *within }
        }
        Source::Flat(of) => Source::Flat(inner(of)),
        Source::AddOne(of) => Source::AddOne(inner(of)),
        Source::Times(of, factor) => Source::Times(inner(of), *factor),
        Source::FirstOf(sources) => Source::FirstOf(list(sources)),
    }
}

/// Modules of a layer, Hugging Face's and llama.cpp's (`gguf-py/gguf/tensor_mapping.py`).
const MODULES: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.router", "ffn_gate_inp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("block_sparse_moe.router.layer", "ffn_gate_inp"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// llama.cpp's name of a tensor. A name that it does not have stays, and is then missing.
pub fn name(of: &Architecture, name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let parts = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        if kind == "e_score_correction_bias" {
            return Some(format!("blk.{layer}.exp_probs_b.bias"));
        }
        if kind == "sinks" {
            return Some(format!("blk.{layer}.attn_sinks.weight"));
        }
        let module = match module {
            "post_attention_layernorm" if of.sandwich => "post_attention_norm",
            "post_attention_layernorm" => "ffn_norm",
            _ => MODULES.iter().find(|(known, _)| *known == module)?.1,
        };
        Some(format!("blk.{layer}.{module}.{kind}"))
    };
    parts().unwrap_or_else(|| name.to_owned())
}
