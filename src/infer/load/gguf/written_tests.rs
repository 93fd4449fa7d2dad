//! GGUF files written from reference checkpoints, with llama.cpp's names and layouts, against the
//! checkpoints' reference outputs.
//!
//! For architectures of which no file is among the references. Names: `gguf-py/gguf/constants.py`
//! and `tensor_mapping.py`; layouts: `convert_hf_to_gguf.py`.

use std::collections::BTreeMap;

use half::bf16;
use serde_json::Value as Json;

use super::super::{Checkpoint, Quantization, open};
use super::tests::{File, Meta};
use crate::backend::KvFormat;
use crate::check::{Expected, REL_MAX, check};
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::families;
use crate::quant::dequantize;
use crate::session::Session;
use crate::testing::converted;
use doppler_testing::references;

/// What a file's metadata says besides what every file's does: llama.cpp's key, and the config's.
type KeysOf = &'static [(&'static str, &'static str)];

struct Written {
    reference: &'static str,
    architecture: &'static str,
    /// Rows of queries and keys are stored for rotation of neighbouring elements.
    permuted: bool,
    /// The norm before the feed-forward has another name.
    post_attention_norm: bool,
    keys: KeysOf,
    /// Numbers that the config does not say.
    fixed: &'static [(&'static str, u32)],
    /// Its rope is scaled.
    yarn: bool,
}

const PLAIN: Written = Written {
    reference: "",
    architecture: "",
    permuted: false,
    post_attention_norm: false,
    keys: &[],
    fixed: &[],
    yarn: false,
};

const GPT_OSS: Written = Written {
    architecture: "gpt-oss",
    post_attention_norm: true,
    keys: &[
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "intermediate_size"),
        ("attention.sliding_window", "sliding_window"),
    ],
    yarn: true,
    ..PLAIN
};

const GRANITE: KeysOf = &[
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
    ("expert_count", "num_local_experts"),
    ("expert_used_count", "num_experts_per_tok"),
];

const WRITTEN: &[Written] = &[
    Written {
        reference: "qwen2-moe",
        architecture: "qwen2moe",
        keys: &[
            ("expert_count", "num_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ],
        ..PLAIN
    },
    Written {
        reference: "olmoe",
        architecture: "olmoe",
        keys: &[("expert_count", "num_experts"), ("expert_used_count", "num_experts_per_tok")],
        ..PLAIN
    },
    Written {
        reference: "glm4-moe",
        architecture: "glm4moe",
        post_attention_norm: true,
        keys: &[
            ("expert_count", "n_routed_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_shared_count", "n_shared_experts"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_weights_norm", "norm_topk_prob"),
            ("leading_dense_block_count", "first_k_dense_replace"),
        ],
        fixed: &[("expert_gating_func", 2), ("rope.dimension_count", 16)],
        ..PLAIN
    },
    Written {
        reference: "ernie4.5-moe",
        architecture: "ernie4_5-moe",
        keys: &[
            ("expert_count", "moe_num_experts"),
            ("expert_used_count", "moe_k"),
            ("expert_shared_count", "moe_num_shared_experts"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("leading_dense_block_count", "moe_layer_start_index"),
            ("interleave_moe_layer_step", "moe_layer_interval"),
        ],
        ..PLAIN
    },
    Written {
        reference: "minimax-m2",
        architecture: "minimax-m2",
        keys: &[
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"),
            ("rope.dimension_count", "rotary_dim"),
        ],
        fixed: &[("expert_gating_func", 2)],
        ..PLAIN
    },
    Written {
        reference: "granite",
        architecture: "granite",
        permuted: true,
        keys: GRANITE,
        ..PLAIN
    },
    Written {
        reference: "granite-moe",
        architecture: "granitemoe",
        permuted: true,
        keys: GRANITE,
        ..PLAIN
    },
    Written {
        reference: "olmo3",
        architecture: "olmo2",
        post_attention_norm: true,
        keys: &[("attention.sliding_window", "sliding_window")],
        yarn: true,
        ..PLAIN
    },
    Written { reference: "gpt-oss", ..GPT_OSS },
    Written { reference: "gpt-oss-odd", ..GPT_OSS },
    Written { reference: "smollm3", architecture: "smollm3", permuted: true, ..PLAIN },
    Written { reference: "phi3", architecture: "phi3", ..PLAIN },
    Written {
        reference: "phi4-mini",
        architecture: "phi3",
        fixed: &[("rope.dimension_count", 24)],
        ..PLAIN
    },
];

/// Parts of a layer: the checkpoint's name, and llama.cpp's.
const PARTS: &[(&str, &str)] = &[
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.qkv_proj.", "attn_qkv."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("post_feedforward_layernorm.", "post_ffw_norm."),
    ("mlp.gate_up_proj.", "ffn_up."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias"),
    ("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.gate.", "ffn_gate_inp."),
    ("block_sparse_moe.gate.", "ffn_gate_inp."),
    ("block_sparse_moe.router.layer.", "ffn_gate_inp."),
    ("mlp.router.", "ffn_gate_inp."),
    ("self_attn.sinks", "attn_sinks.weight"),
];

/// The matrices of experts, shared ones included, under all their names.
const MATRICES: &[(&str, &str)] = &[
    ("gate_proj", "gate"),
    ("up_proj", "up"),
    ("down_proj", "down"),
    ("w1", "gate"),
    ("w3", "up"),
    ("w2", "down"),
];

/// A tensor: its shape with the outermost dimension first, and its values.
type Values = (Vec<u64>, Vec<f32>);

fn values(checkpoint: &dyn Checkpoint, name: &str) -> Values {
    let stored = checkpoint.find(name).unwrap();
    let (dtype, (rows, cols)) = (stored.dtype().unwrap(), stored.rows_cols());
    let row = dtype.row_bytes(cols as usize);
    let mut bytes = vec![0; rows as usize * row];
    checkpoint.read(name, 0, &mut bytes).unwrap();
    let mut all = vec![0.0; (rows * cols) as usize];
    for (bytes, values) in bytes.chunks_exact(row).zip(all.chunks_exact_mut(cols as usize)) {
        dequantize(dtype, bytes, cols as usize, values);
    }
    (stored.shape.clone(), all)
}

/// All tensors under llama.cpp's names.
fn tensors(of: &Written, checkpoint: &dyn Checkpoint, head_dim: usize) -> BTreeMap<String, Values> {
    let mut out: BTreeMap<String, Values> = BTreeMap::new();
    let mut stacks: BTreeMap<String, BTreeMap<usize, Values>> = BTreeMap::new();
    for name in checkpoint.names() {
        let (shape, mut data) = values(checkpoint, name);
        let Some((layer, part)) =
            name.strip_prefix("model.layers.").and_then(|n| n.split_once('.'))
        else {
            let own = match name {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                "lm_head.weight" => "output.weight",
                other => panic!("{other}"),
            };
            out.insert(own.into(), (shape, data));
            continue;
        };
        let own = |rest: &str| format!("blk.{layer}.{rest}");
        if part.contains("input_linear") {
            // Gates and ups of each expert, one after the other.
            let (experts, cols) = (shape[0] as usize, shape[2]);
            let half = data.len() / experts / 2;
            for (which, kind) in ["gate", "up"].into_iter().enumerate() {
                let each = data.chunks_exact(2 * half).flat_map(|e| &e[which * half..][..half]);
                let dims = vec![shape[0], shape[1] / 2, cols];
                out.insert(
                    own(&format!("ffn_{kind}_exps.weight")),
                    (dims, each.copied().collect()),
                );
            }
            continue;
        }
        if part.contains("output_linear") {
            out.insert(own("ffn_down_exps.weight"), (shape, data));
            continue;
        }
        if let Some(kind) = part.strip_prefix("mlp.experts.").filter(|kind| !kind.contains('.')) {
            out.extend(by_turns(kind, shape, data).into_iter().map(|(kind, of)| (own(&kind), of)));
            continue;
        }
        let matrix = |name: &str| MATRICES.iter().find(|(known, _)| *known == name).unwrap().1;
        if let Some((_, rest)) = part.split_once(".experts.") {
            let mut words = rest.split('.');
            let number: usize = words.next().unwrap().parse().unwrap();
            let stack = own(&format!("ffn_{}_exps.weight", matrix(words.next().unwrap())));
            stacks.entry(stack).or_default().insert(number, (shape, data));
            continue;
        }
        if let Some(rest) =
            ["mlp.shared_expert.", "mlp.shared_experts."].iter().find_map(|p| part.strip_prefix(p))
        {
            let kind = matrix(rest.split_once('.').unwrap().0);
            out.insert(own(&format!("ffn_{kind}_shexp.weight")), (shape, data));
            continue;
        }
        if of.permuted && (part.contains("q_proj") || part.contains("k_proj")) {
            let cols = *shape.last().unwrap() as usize;
            data = neighbours(&data, cols, head_dim);
        }
        let part = match part {
            "post_attention_layernorm.weight" if of.post_attention_norm => {
                "post_attention_norm.weight".to_owned()
            }
            "post_attention_layernorm.weight" => "ffn_norm.weight".to_owned(),
            part => {
                let (from, to) = PARTS.iter().find(|(from, _)| part.starts_with(from)).unwrap();
                part.replacen(from, to, 1)
            }
        };
        // Converters write vectors without dimensions of 1.
        let shape = shape.into_iter().filter(|n| *n > 1).collect();
        out.insert(own(&part), (shape, data));
    }
    for (name, experts) in stacks {
        let mut shape = experts[&0].0.clone();
        shape.insert(0, experts.len() as u64);
        out.insert(name, (shape, experts.into_values().flat_map(|(_, data)| data).collect()));
    }
    out
}

/// gpt-oss's stacks: matrices are transposed, and gates and ups, which take turns, come apart.
fn by_turns(kind: &str, shape: Vec<u64>, data: Vec<f32>) -> Vec<(String, Values)> {
    let end = if kind.ends_with("_bias") { "bias" } else { "weight" };
    let experts = shape[0] as usize;
    let rows = *shape.last().unwrap() as usize;
    let cols = data.len() / experts / rows;
    let named = |part: &str, start: usize, step: usize| {
        let each = data.chunks_exact(rows * cols).flat_map(move |expert| {
            (start..rows)
                .step_by(step)
                .flat_map(move |row| (0..cols).map(move |c| expert[c * rows + row]))
        });
        let mut dims = vec![shape[0], (rows / step) as u64];
        dims.extend((end == "weight").then_some(cols as u64));
        (format!("ffn_{part}_exps.{end}"), (dims, each.collect()))
    };
    match kind.starts_with("gate_up") {
        true => vec![named("gate", 0, 2), named("up", 1, 2)],
        false => vec![named("down", 0, 1)],
    }
}

/// Rows of heads, halves interleaved (`LlamaModel.permute`).
fn neighbours(data: &[f32], cols: usize, head_dim: usize) -> Vec<f32> {
    let row = |number: usize| {
        let (head, within) = (number / head_dim, number % head_dim);
        let from = head * head_dim + within % 2 * (head_dim / 2) + within / 2;
        &data[from * cols..][..cols]
    };
    (0..data.len() / cols).flat_map(row).copied().collect()
}

fn metadata(of: &Written, config: &Json, graph: &crate::graph::Graph) -> Vec<(&'static str, Meta)> {
    let key = |key: &str| -> &'static str { format!("{}.{key}", of.architecture).leak() };
    let number = |name: &str| config[name].as_u64().map(|n| Meta::U32(n as u32));
    let ropes = &config["rope_parameters"];
    let rope = ropes.get("full_attention").unwrap_or(ropes)["rope_theta"].as_f64();
    let theta = config["rope_theta"].as_f64().or(rope).unwrap() as f32;
    let mut out = vec![
        ("general.architecture", Meta::Text(of.architecture)),
        (key("rope.freq_base"), Meta::F32(theta)),
        (
            key("attention.layer_norm_rms_epsilon"),
            Meta::F32(config["rms_norm_eps"].as_f64().unwrap() as f32),
        ),
    ];
    for (name, from) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        out.push((key(name), number(from).unwrap()));
    }
    let width = graph.kv[0].head_dim as u32;
    out.push((key("attention.key_length"), Meta::U32(width)));
    out.push((key("attention.value_length"), Meta::U32(width)));
    for (name, from) in of.keys {
        let value = match &config[*from] {
            Json::Null => continue,
            Json::Bool(value) => Meta::Bool(*value),
            value if value.is_u64() => Meta::U32(value.as_u64().unwrap() as u32),
            value => Meta::F32(value.as_f64().unwrap() as f32),
        };
        out.push((key(name), value));
    }
    if of.yarn {
        let ropes = &config["rope_parameters"];
        let rope = ropes.get("full_attention").unwrap_or(ropes);
        let original = rope["original_max_position_embeddings"].as_u64().unwrap() as u32;
        let factor = rope["factor"].as_f64().unwrap() as f32;
        out.push((key("rope.scaling.type"), Meta::Text("yarn")));
        out.push((key("rope.scaling.factor"), Meta::F32(factor)));
        out.push((key("rope.scaling.original_context_length"), Meta::U32(original)));
        if let Some(factor) = rope["attention_factor"].as_f64() {
            out.push((key("rope.scaling.attn_factor"), Meta::F32(factor as f32)));
        }
    }
    out.extend(of.fixed.iter().map(|(name, value)| (key(name), Meta::U32(*value))));
    out
}

#[test]
fn files_written_from_references_agree_with_them() {
    for of in WRITTEN {
        let Some(dir) = references().into_iter().find(|dir| dir.ends_with(of.reference)) else {
            println!("skipped: {} is not here", of.reference);
            continue;
        };
        let checkpoint = open(&dir).unwrap();
        let graph = families::read(checkpoint.config()).unwrap().graph;
        let tensors = tensors(of, checkpoint.as_ref(), graph.kv[0].head_dim);
        let list = tensors.into_iter().map(|(name, (mut shape, data))| {
            let vector = shape.len() == 1 || name.ends_with(".bias");
            shape.reverse();
            let bytes: Vec<u8> = match vector {
                true => data.iter().flat_map(|v| v.to_le_bytes()).collect(),
                false => data.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            let name: &'static str = name.leak();
            (name, shape, if vector { 0 } else { 30 }, bytes)
        });
        let metadata = metadata(of, checkpoint.config(), &graph);
        let file = File { metadata, tensors: list.collect() };
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("model.gguf");
        file.write(&path);
        let model = converted(&path, Quantization::Keep, 1 << 20);
        let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected::parse(&expected).unwrap();
        let (context, kv) = (Some(96), KvFormat::F32);
        let options = LoadOptions { context, kv, ..LoadOptions::default() };
        let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
        let report = check(&mut session, &expected).unwrap();
        println!("{} from {}: {report:?}", of.architecture, of.reference);
        assert!(report.passes(REL_MAX), "{}: {report:?}", of.architecture);
    }
}
