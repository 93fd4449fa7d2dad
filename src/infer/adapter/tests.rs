//! Adapters attached and detached: the same as merged weights, on any device; every form read; what
//! does not fit refused by name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::{Adapter, Attached, Delta, Matrix, Naming, open, open_manifest, store};
use crate::backend::{Device, KvFormat, LogitRows};
use crate::cpu::CpuDevice;
use crate::engine::{Engine, LoadOptions, Rows};
use crate::graph::{Op, WeightRole};
use crate::load::{MemorySink, Meta, header_bytes};
use crate::model::Model;
use crate::sampler::SamplerOptions;
use crate::sequence::Sequence;
use crate::source::Source;
use crate::testing::{self, Wanted};
use doppler_store::{DType, ModelId, ShardId};

const VOCAB: u32 = 97;
const PROMPT: [u32; 11] = [3, 90, 4, 77, 12, 8, 33, 61, 5, 44, 9];

/// Small models of several families: biases, packed matrices, experts, convolutions, delta nets.
pub(crate) fn configs() -> Vec<Value> {
    let sizes = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    });
    let with = |own: Value| {
        let mut config = sizes.clone();
        let own = own.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(own);
        config
    };
    vec![
        with(json!({ "architectures": ["LlamaForCausalLM"] })),
        with(json!({ "architectures": ["Qwen2ForCausalLM"] })),
        with(json!({ "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0 })),
        with(json!({ "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
            "num_experts_per_tok": 2 })),
        json!({ "architectures": ["Lfm2MoeForCausalLM"], "hidden_size": 64,
            "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
            "max_position_embeddings": 128, "num_experts": 4, "num_experts_per_tok": 2,
            "num_dense_layers": 1, "conv_L_cache": 4,
            "layer_types": ["conv", "full_attention"] }),
    ]
}

/// The stored tensor that a product's weight is made from, and the rows that it takes.
fn stored(source: &Source, own: &str) -> Option<(String, Option<(usize, usize)>)> {
    match source {
        Source::Itself => Some((own.to_owned(), None)),
        Source::Stored(name) => Some((name.clone(), None)),
        Source::Rows { of, take } if take.step == 1 => {
            Some((stored(of, own)?.0, Some((take.start, take.count))))
        }
        _ => None,
    }
}

/// What random adapters change: every product of the graph, by its stored tensor.
fn targets(model: &Model) -> BTreeMap<String, (usize, usize)> {
    let mut found = BTreeMap::new();
    for op in &model.graph.ops {
        let Op::Linear { weight, .. } = op else { continue };
        let weight = model.graph.weight_spec(*weight);
        // Two experts may be so close that rounding decides between them.
        if weight.role == WeightRole::Router {
            continue;
        }
        let Some((name, rows)) = stored(&weight.source, &weight.tensor) else { continue };
        let end = rows.map_or(weight.rows, |(start, count)| start + count);
        let entry = found.entry(name).or_insert((0, weight.cols));
        entry.0 = end.max(entry.0);
    }
    found
}

fn random(rng: &mut StdRng, rows: usize, cols: usize) -> Matrix {
    let scale = 1.0 / (cols as f32).sqrt();
    let values = (0..rows * cols).map(|_| rng.random_range(-scale..scale)).collect();
    Matrix { rows, cols, values, dtype: DType::F32 }
}

/// An adapter of random matrices.
pub(crate) fn random_adapter(model: &Model, seed: u64, rank: usize, scale: f32) -> Adapter {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut delta = |(name, (rows, cols)): (String, (usize, usize))| {
        let (a, b) = (random(&mut rng, rank, cols), random(&mut rng, rows, rank));
        (name, Delta { a, b, scale })
    };
    let deltas = targets(model).into_iter().map(&mut delta).collect();
    Adapter::new(format!("random-{seed}"), "base".into(), Naming::HuggingFace, None, deltas)
        .unwrap()
}

/// The model's values from a seed, and with adapters merged into them.
fn models(config: &Value, seed: u64, set: &dyn Fn(&Model) -> Vec<Attached>) -> (Model, Model) {
    let values = |wanted: &Wanted<'_>| {
        let mut rng = StdRng::seed_from_u64(seed ^ blake3_word(wanted.name));
        let scale = if wanted.rows == 1 { 1.0 } else { 1.0 / (wanted.cols as f32).sqrt() };
        (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-scale..scale)).collect::<Vec<_>>()
    };
    let base = testing::model(config, values, |_| DType::F32).0;
    let set = set(&base);
    let graph = base.graph.clone();
    let merged = |wanted: &Wanted<'_>| {
        let mut all = values(wanted);
        let Some(weight) = graph.weights.iter().find(|weight| weight.tensor == wanted.name) else {
            return all;
        };
        let Some((name, rows)) = stored(&weight.source, &weight.tensor) else { return all };
        let first = rows.map_or(0, |(start, _)| start);
        for Attached { adapter, weight } in &set {
            let Some(Delta { a, b, scale }) = adapter.deltas.get(&name) else { continue };
            for (row, out) in all.chunks_exact_mut(wanted.cols).enumerate() {
                for (r, factor) in b.row(first + row).iter().enumerate() {
                    let factor = f64::from(*factor) * f64::from(scale * weight);
                    for (out, value) in out.iter_mut().zip(a.row(r)) {
                        *out = (f64::from(*out) + factor * f64::from(*value)) as f32;
                    }
                }
            }
        }
        all
    };
    let merged = testing::model(config, merged, |_| DType::F32).0;
    (base, merged)
}

fn blake3_word(name: &str) -> u64 {
    u64::from_le_bytes(blake3::hash(name.as_bytes()).as_bytes()[..8].try_into().unwrap())
}

fn engine(model: &Model, device: &dyn Device) -> Engine {
    let (context, kv) = (Some(64), KvFormat::F32);
    let options = LoadOptions { context, batch: 16, kv, ..LoadOptions::default() };
    Engine::load(model, device, &options).unwrap()
}

fn fresh() -> Sequence {
    Sequence::new(SamplerOptions::default(), 64).unwrap()
}

/// The logits of a prompt and of some single tokens after it.
fn logits(engine: &mut Engine, sequence: &mut Sequence) -> Vec<f32> {
    let mut rows = [Rows { sequence, tokens: &PROMPT, logits: LogitRows::All }];
    let mut all = engine.step(&mut rows).unwrap().remove(0);
    for token in [17, 2, 80] {
        let mut rows = [Rows { sequence, tokens: &[token], logits: LogitRows::Last }];
        all.extend(engine.step(&mut rows).unwrap().remove(0));
    }
    all
}

/// The norm of the difference over the norm of what is expected.
fn rel(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |value: f64| value * value;
    let differences = found.iter().zip(expected).map(|(a, b)| square(f64::from(a - b)));
    let norm = expected.iter().map(|value| square(f64::from(*value))).sum::<f64>().sqrt();
    differences.sum::<f64>().sqrt() / norm
}

/// Two adapters with weights, of one model on one device.
pub(crate) fn attaches(config: &Value, device: &dyn Device, seed: u64) {
    let name = &config["architectures"][0];
    let both = |model: &Model| {
        let pair = [(seed, 4, 2.0, 0.75), (seed + 1, 3, 0.5, -1.5)];
        let adapter = |(seed, rank, scale, weight)| {
            let adapter = Arc::new(random_adapter(model, seed, rank, scale));
            Attached { adapter, weight }
        };
        pair.map(adapter).to_vec()
    };
    let (base, merged) = models(config, seed, &both);
    let set = both(&base);
    let mut engine = engine(&base, device);
    let plain = logits(&mut engine, &mut fresh());
    let bytes = engine.stats().trunk_bytes;
    let expected = logits(&mut self::engine(&merged, device), &mut fresh());
    engine.adapt(&set).unwrap();
    assert!(engine.stats().trunk_bytes > bytes);
    engine.adapt(&[]).unwrap();
    assert_eq!(engine.stats().trunk_bytes, bytes, "{name}");
    engine.adapt(&set).unwrap();
    let mut begun = fresh();
    let adapted = logits(&mut engine, &mut begun);
    let (error, effect) = (rel(&adapted, &expected), rel(&adapted, &plain));
    println!("{name} on {}, seed {seed}: {error:.1e}, effect {effect:.2}", engine.describe());
    assert!(error <= 1e-3, "{name}, seed {seed}: {error}");
    assert!(effect > 0.05, "{name}, seed {seed}: the adapters change next to nothing: {effect}");
    // One of them, in place of both.
    engine.adapt(&set[..1]).unwrap();
    let one = logits(&mut engine, &mut fresh());
    assert!(rel(&one, &adapted) > 1e-2, "{name}, seed {seed}");
    // Without adapters everything is as before, bit by bit.
    engine.adapt(&[]).unwrap();
    assert_eq!(logits(&mut engine, &mut fresh()), plain, "{name}, seed {seed}");
    // A sequence that ran with other adapters continues as if it had run with these.
    let last = |engine: &mut Engine, sequence: &mut Sequence| {
        let mut rows = [Rows { sequence, tokens: &[5], logits: LogitRows::Last }];
        engine.step(&mut rows).unwrap().remove(0)
    };
    let mut other = fresh();
    logits(&mut engine, &mut other);
    let (continued, expected) = (last(&mut engine, &mut begun), last(&mut engine, &mut other));
    let error = rel(&continued, &expected);
    assert!(error <= 1e-4, "{name}, seed {seed}: old keys were used: {error}");
}

#[test]
fn attached_adapters_compute_what_merged_weights_do_and_leave_nothing_behind() {
    let first = std::env::var("DOPPLER_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    for config in configs() {
        (0..3).for_each(|seed| attaches(&config, &CpuDevice, first.unwrap_or(1) + 100 * seed));
    }
}

fn llama() -> Model {
    testing::random(&configs()[0], 1, |_| DType::F32)
}

/// A PEFT directory of an adapter, with its config changed.
fn peft(adapter: &Adapter, alpha: f64, change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json!({
        "peft_type": "LORA", "r": adapter.rank(), "lora_alpha": alpha, "lora_dropout": 0.1,
        "base_model_name_or_path": "lab/base", "bias": "none", "target_modules": ["q_proj"],
        "modules_to_save": null, "use_dora": false, "use_rslora": false, "rank_pattern": {},
        "alpha_pattern": {}, "task_type": "CAUSAL_LM", "fan_in_fan_out": false,
        "init_lora_weights": true, "loftq_config": {}, "megatron_config": null,
    });
    change(&mut config);
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    save(adapter, &dir.path().join("adapter_model.safetensors"));
    dir
}

fn save(adapter: &Adapter, file: &Path) {
    let mut tensors = BTreeMap::new();
    for (name, Delta { a, b, .. }) in &adapter.deltas {
        let module = name.strip_suffix(".weight").unwrap();
        for (part, matrix) in [("lora_A", a), ("lora_B", b)] {
            let bytes: Vec<u8> = matrix.values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let name = format!("base_model.model.{module}.{part}.weight");
            tensors.insert(name, (vec![matrix.rows, matrix.cols], bytes));
        }
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, file).unwrap();
}

#[test]
fn pefts_directories_are_read_with_their_scales() {
    let wanted = random_adapter(&llama(), 7, 4, 2.0);
    let dir = peft(&wanted, 8.0, |_| {});
    let found = open(dir.path()).unwrap();
    assert_eq!((&found.deltas, found.base.as_str()), (&wanted.deltas, "lab/base"));
    assert!(super::is_here(dir.path()));
    let stabilised = open(peft(&wanted, 8.0, |c| c["use_rslora"] = true.into()).path()).unwrap();
    assert!(stabilised.deltas.values().all(|delta| delta.scale == 4.0));
    let pattern = |config: &mut Value| config["alpha_pattern"] = json!({ "1.self_attn.q_proj": 1 });
    let patterned = open(peft(&wanted, 8.0, pattern).path()).unwrap();
    for (name, delta) in &patterned.deltas {
        let own = name == "model.layers.1.self_attn.q_proj.weight";
        assert_eq!(delta.scale, if own { 0.25 } else { 2.0 }, "{name}");
    }
}

#[test]
fn what_changes_a_model_otherwise_is_refused_by_name() {
    let adapter = random_adapter(&llama(), 7, 4, 2.0);
    type Change = fn(&mut Value);
    let cases: &[(&str, Change)] = &[
        ("use_dora", |c| c["use_dora"] = true.into()),
        ("bias \"all\"", |c| c["bias"] = "all".into()),
        ("modules_to_save", |c| c["modules_to_save"] = json!(["lm_head"])),
        ("type \"LOHA\"", |c| c["peft_type"] = "LOHA".into()),
        ("pissa", |c| c["init_lora_weights"] = "pissa_niter_4".into()),
        ("fan_in_fan_out", |c| c["fan_in_fan_out"] = true.into()),
        ("something_new", |c| c["something_new"] = 3.into()),
        ("has rank 4, and adapter_config.json says 8", |c| c["r"] = 8.into()),
        ("lora_alpha", |c| c["lora_alpha"] = "x".into()),
        ("expression", |c| c["rank_pattern"] = json!({ "(q|k)_proj": 2 })),
    ];
    for (wanted, change) in cases {
        let error = open(peft(&adapter, 8.0, change).path()).unwrap_err().to_string();
        assert!(error.contains(wanted) && !error.contains('\n'), "{wanted}: {error}");
    }
    // Matrices that do not belong together.
    let mut torn = adapter.clone();
    let delta = torn.deltas.get_mut("model.layers.0.self_attn.k_proj.weight").unwrap();
    delta.b = random(&mut StdRng::seed_from_u64(1), 32, 5);
    let error = open(peft(&torn, 8.0, |_| {}).path()).unwrap_err().to_string();
    assert!(error.contains("k_proj") && error.contains("rank 4 and its B rank 5"), "{error}");
}

#[test]
fn an_adapter_of_another_model_changes_nothing() {
    let model = llama();
    let mut engine = engine(&model, &CpuDevice);
    let fitting = Arc::new(random_adapter(&model, 3, 2, 1.0));
    let plain = logits(&mut engine, &mut fresh());
    let mut wrong = random_adapter(&model, 7, 4, 2.0);
    let q = "model.layers.0.self_attn.q_proj.weight";
    wrong.deltas.get_mut(q).unwrap().b = random(&mut StdRng::seed_from_u64(1), 48, 4);
    let mut longer = random_adapter(&model, 7, 4, 2.0);
    let of = |name: &str| random_adapter(&model, 7, 4, 2.0).deltas[name].clone();
    longer.deltas.insert("model.layers.2.self_attn.q_proj.weight".into(), of(q));
    let mut head = random_adapter(&model, 7, 4, 2.0);
    head.deltas.insert("lm_head.weight".into(), of(q));
    let mut experts = random_adapter(&model, 7, 4, 2.0);
    experts.deltas.insert("model.layers.0.mlp.experts.0.w1.weight".into(), of(q));
    for (adapter, part) in [
        (wrong, "a matrix of [48, 64], and model.layers.0.self_attn.q_proj.weight is [64, 64]"),
        (longer, "model.layers.2.self_attn.q_proj.weight, which the model does not have"),
        (head, "the vocabulary's matrix lm_head.weight"),
        (experts, "experts"),
    ] {
        let set = [
            Attached { adapter: fitting.clone(), weight: 1.0 },
            Attached { adapter: Arc::new(adapter), weight: 1.0 },
        ];
        let error = engine.adapt(&set).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
        assert!(error.contains("random-7"), "{error}");
        assert_eq!(logits(&mut engine, &mut fresh()), plain);
    }
    let heavy = [Attached { adapter: fitting.clone(), weight: f32::NAN }];
    assert!(engine.adapt(&heavy).unwrap_err().to_string().contains("NaN is out of range"));
    let many = vec![Attached { adapter: fitting, weight: 0.1 }; 9];
    assert!(engine.adapt(&many).unwrap_err().to_string().contains("9 adapters at once"));
}

#[test]
fn a_published_adapter_is_the_one_that_was_read() {
    let adapter = random_adapter(&llama(), 9, 5, 0.3);
    let mut sink = MemorySink::default();
    let base = ModelId::of(b"base");
    let manifest = store(&adapter, base, &mut sink).unwrap();
    assert!(super::is_adapter(&manifest));
    assert_eq!(super::described(&manifest).unwrap().base, base);
    let again = doppler_store::Manifest::parse(&manifest.to_json_bytes()).unwrap();
    assert_eq!(again.tensors.iter().next().unwrap().1.role.name(), super::ROLE);
    let mut bytes = |index: u32| {
        let id: ShardId = again.shards[index as usize].id().unwrap();
        Ok(sink.get(id).unwrap().to_vec())
    };
    assert_eq!(open_manifest(&again, &mut bytes).unwrap(), adapter);
}

/// Doppler's manifests: inline as `[cols, rank]` and `[rank, rows]`, with a checksum.
#[test]
fn dopplers_manifests_are_read() {
    let model = llama();
    let wanted = random_adapter(&model, 5, 4, 2.0);
    let q = &wanted.deltas["model.layers.1.self_attn.q_proj.weight"];
    let down = &wanted.deltas["model.layers.0.mlp.down_proj.weight"];
    let tensor = |name: &str, matrix: &Matrix| {
        let turned = matrix.transposed();
        json!({ "name": name, "shape": [turned.rows, turned.cols], "dtype": "f32",
            "data": turned.values })
    };
    let mut manifest = json!({
        "id": "tone", "name": "A tone", "baseModel": "base", "rank": 4, "alpha": 8,
        "targetModules": ["q_proj", "down_proj"],
        "tensors": [
            tensor("layer.1.q_proj.lora_a", &q.a), tensor("layer.1.q_proj.lora_b", &q.b),
            tensor("layers.0.down_proj.lora_a", &down.a),
            tensor("layers.0.down_proj.lora_b", &down.b),
        ],
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("adapter.json");
    let read = |manifest: &Value| {
        std::fs::write(&file, manifest.to_string()).unwrap();
        open(&file)
    };
    let found = read(&manifest).unwrap();
    assert_eq!((found.name.as_str(), found.deltas.len()), ("tone", 2));
    // It computes what the same change under the checkpoint's names does.
    let names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"];
    let same = names.map(|name| (name.to_owned(), wanted.deltas[name].clone())).into();
    let same = Adapter::new("x".into(), String::new(), Naming::HuggingFace, None, same).unwrap();
    let mut engine = engine(&model, &CpuDevice);
    let [one, other] = [found, same].map(|adapter| {
        engine.adapt(&[Attached { adapter: Arc::new(adapter), weight: 1.0 }]).unwrap();
        logits(&mut engine, &mut fresh())
    });
    assert_eq!(one, other);
    manifest["checksum"] = "00".repeat(32).into();
    assert!(read(&manifest).unwrap_err().to_string().contains("checksum"));
    manifest["checksum"] = Value::Null;
    manifest["rank"] = 3.into();
    let error = read(&manifest).unwrap_err().to_string();
    assert!(error.contains("does not have rank 3"), "{error}");
    manifest["rank"] = 4.into();
    manifest["tensors"][0]["data"] = Value::Null;
    manifest["tensors"][0]["url"] = "http://127.0.0.1/a".into();
    assert!(read(&manifest).unwrap_err().to_string().contains("not in the file"));
    manifest["tensors"] = json!([]);
    manifest["weightsFormat"] = "npz".into();
    assert!(read(&manifest).unwrap_err().to_string().contains("weightsFormat \"npz\""));
}

/// llama.cpp's adapters: its names, and its order of the rows of queries.
#[test]
fn gguf_adapters_are_read() {
    let model = llama();
    let wanted = random_adapter(&model, 5, 4, 2.0);
    let names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"];
    let [q, down] = names.map(|name| wanted.deltas[name].clone());
    let half = 8;
    // Of each head of 16 rows, the halves that rotate together become neighbours.
    let order = (0..64).map(|row| row / 16 * 16 + row % 2 * half + row % 16 / 2);
    let turned = q.b.rows_of(order.collect::<Vec<usize>>().into_iter());
    let matrices = [
        ("blk.1.attn_q.weight.lora_a", &q.a),
        ("blk.1.attn_q.weight.lora_b", &turned),
        ("blk.0.ffn_down.weight.lora_a", &down.a),
        ("blk.0.ffn_down.weight.lora_b", &down.b),
    ];
    let tensors = matrices.map(|(name, matrix)| {
        let shape = vec![matrix.rows as u64, matrix.cols as u64];
        (name.to_owned(), shape, 0, matrix.values.len() as u64 * 4)
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tone.gguf");
    let write = |kind: &str, alpha: f32| {
        let text = |text: &str| Meta::Text(text.to_owned());
        let metadata = [
            ("general.type".to_owned(), text("adapter")),
            ("general.architecture".to_owned(), text("llama")),
            ("adapter.type".to_owned(), text(kind)),
            ("adapter.lora.alpha".to_owned(), Meta::Float(alpha)),
        ];
        let (mut bytes, offsets, total) = header_bytes(&metadata, &tensors, 32);
        let data = bytes.len();
        bytes.resize(total as usize, 0);
        for (offset, (_, matrix)) in offsets.iter().zip(matrices) {
            let values = bytemuck::cast_slice(&matrix.values);
            bytes[data + *offset as usize..][..values.len()].copy_from_slice(values);
        }
        std::fs::write(&file, bytes).unwrap();
    };
    write("lora", 8.0);
    assert!(super::is_here(&file));
    let found = open(&file).unwrap();
    let same = names.into_iter().zip([q.clone(), down.clone()]);
    let same = same.map(|(name, delta)| (name.to_owned(), delta)).collect();
    let same = Adapter::new("x".into(), String::new(), Naming::HuggingFace, None, same).unwrap();
    let mut engine = engine(&model, &CpuDevice);
    let [one, other] = [found, same].map(|adapter| {
        engine.adapt(&[Attached { adapter: Arc::new(adapter), weight: 1.0 }]).unwrap();
        logits(&mut engine, &mut fresh())
    });
    assert_eq!(one, other);
    let as_model = crate::load::open(&file).err().expect("it is no model").to_string();
    assert!(as_model.contains("an adapter, not a model"), "{as_model}");
    write("control_vector", 8.0);
    let error = open(&file).unwrap_err().to_string();
    assert!(error.contains("adapter.type is \"control_vector\""), "{error}");
}
