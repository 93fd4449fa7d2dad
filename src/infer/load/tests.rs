//! Conversions read back: every tensor is close to its source, experts are aligned and adjacent.
//! And every way in which a checkpoint can be wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use super::inspect::inspect;
use super::recipe::Resolved;
use super::*;
use crate::families;
use crate::graph::Weight;
use crate::quant::dequantize;
use crate::testing::references;
use doppler_store::manifest::{Role, TensorEntry};
use doppler_store::{
    ByteRange, DType, Manifest, ModelId, RangeReader, ReadError, ReadRequest, ShardId,
};
use doppler_testing::shared;

const PAGE: u64 = 4096;

fn rng() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

fn to_dir(source: &Path, quantization: Quantization, shard: u64, out: &Path) -> Result<Manifest> {
    let mut sink = DirSink::new(out)?;
    convert(open(source)?.as_ref(), quantization, shard, &mut sink, &mut |_| {})
}

pub fn to_memory(source: &Path, quantization: Quantization) -> Result<(Manifest, MemorySink)> {
    let mut sink = MemorySink::default();
    let shard = SHARD_BYTES_DEFAULT;
    let checkpoint = open(source)?;
    let manifest = convert(checkpoint.as_ref(), quantization, shard, &mut sink, &mut |_| {})?;
    Ok((manifest, sink))
}

/// A mixture of experts with odd sizes.
fn small_config(layers: u64, hidden: u64, ff: u64, experts: u64) -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 70,
        "max_position_embeddings": 128, "num_local_experts": experts, "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "eos_token_id": [2, 3],
    })
}

type Tensors = BTreeMap<String, (Vec<u64>, Vec<u8>)>;

/// Random BF16 tensors for everything that the config's graph reads.
fn random_tensors(config: &Value, rng: &mut StdRng) -> Tensors {
    let graph = families::read(config).unwrap().graph;
    let mut shapes: Vec<(String, Vec<u64>)> = graph
        .weights
        .iter()
        .map(|w| (w.tensor.clone(), [w.rows as u64, w.cols as u64]))
        .map(|(name, shape)| {
            let vector = name.contains("norm") || name.ends_with("bias");
            (name, if vector { shape[1..].to_vec() } else { shape.to_vec() })
        })
        .collect();
    for moe in &graph.moe {
        let (ff, hidden) = (moe.ff as u64, moe.hidden as u64);
        for expert in &moe.experts {
            shapes.push((expert.gate.name.clone(), vec![ff, hidden]));
            shapes.push((expert.up.name.clone(), vec![ff, hidden]));
            shapes.push((expert.down.name.clone(), vec![hidden, ff]));
        }
    }
    let mut random = |shape: &[u64]| {
        (0..shape.iter().product())
            .flat_map(|_| bf16::from_f32(rng.random_range(-0.1..0.1)).to_le_bytes())
            .collect()
    };
    shapes.into_iter().map(|(name, shape)| (name, (shape.clone(), random(&shape)))).collect()
}

fn write_safetensors(path: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": offsets }),
        );
        data.extend_from_slice(bytes);
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(path, file).unwrap();
}

/// A checkpoint of one weight file, or of two with an index.
fn write_checkpoint(dir: &Path, config: &Value, tensors: &Tensors, split: bool) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    if !split {
        return write_safetensors(&dir.join("model.safetensors"), tensors);
    }
    let mut parts = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        parts[i % 2].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
    }
    for (i, part) in parts.iter().enumerate() {
        write_safetensors(&dir.join(format!("part-{i}.safetensors")), part);
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A small valid checkpoint in `dir/hf`.
fn small_checkpoint(dir: &Path, split: bool) -> (PathBuf, Value, Tensors) {
    let config = small_config(2, 64, 96, 3);
    let tensors = random_tensors(&config, &mut rng());
    let hf = dir.join("hf");
    write_checkpoint(&hf, &config, &tensors, split);
    (hf, config, tensors)
}

/// Bytes of a tensor from whole shards.
fn stored(tensor: &TensorEntry, shards: &[Vec<u8>]) -> Vec<u8> {
    let part = |s: &doppler_store::manifest::Span| {
        &shards[s.shard as usize][s.offset as usize..(s.offset + s.size) as usize]
    };
    tensor.spans.iter().flat_map(|span| part(span).to_vec()).collect()
}

fn weights(dtype: DType, bytes: &[u8], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / dtype.row_bytes(cols) * cols];
    for (row, out) in bytes.chunks_exact(dtype.row_bytes(cols)).zip(out.chunks_exact_mut(cols)) {
        dequantize(dtype, row, cols, out);
    }
    out
}

/// Reads the output back and compares every tensor with its source, by every rule.
fn verify(out: &Path, source: &Path, quantization: Quantization) -> Manifest {
    let manifest = Manifest::read_dir(out).unwrap();
    let shards: Vec<Vec<u8>> =
        manifest.shards.iter().map(|s| fs::read(out.join(&s.filename)).unwrap()).collect();
    for (shard, bytes) in manifest.shards.iter().zip(&shards) {
        assert_eq!(shard.size, bytes.len() as u64);
        assert!(shard.hash.matches(bytes));
        assert_eq!(shard.id().unwrap(), ShardId::of(bytes));
    }
    let checkpoint = open(source).unwrap();
    assert_eq!(manifest.config, *checkpoint.config());
    let graph = families::read(&manifest.config).unwrap().graph;
    let experts =
        graph.moe.iter().flat_map(|moe| (0..moe.experts.len()).flat_map(|e| moe.weights(e)));
    let weights_of: BTreeMap<String, Weight> =
        graph.weights.iter().cloned().chain(experts).map(|of| (of.tensor.clone(), of)).collect();
    for (name, tensor) in manifest.tensors.iter() {
        let from = Resolved::new(checkpoint.as_ref(), &weights_of[name]).unwrap();
        let (rows, dtype) = (from.rows as usize, from.dtype);
        let mut raw = vec![0; rows * from.row_bytes()];
        from.read(checkpoint.as_ref(), 0, &mut raw).unwrap();
        let bytes = stored(tensor, &shards);
        assert_eq!(tensor.shape, from.shape(), "{name}");
        let kept = matches!(tensor.role, Role::Norm | Role::Router | Role::Other);
        if kept || quantization == Quantization::Keep || tensor.dtype == dtype {
            assert_eq!(tensor.dtype, dtype, "{name}");
            assert_eq!(bytes, raw, "{name}: bit for bit");
            continue;
        }
        let cols = tensor.rows_cols().1 as usize;
        let (want, have) = (weights(dtype, &raw, cols), weights(tensor.dtype, &bytes, cols));
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = norm(&mut want.iter().zip(&have).map(|(a, b)| a - b));
        let relative = (error / norm(&mut want.iter().copied())).sqrt();
        let bound = f64::max(1.08 * crate::quant::layout(tensor.dtype).error, 0.01);
        assert!(relative < bound, "{name} in {}: {relative}", tensor.dtype);
    }
    verify_layout(&manifest);
    manifest
}

/// Experts and trunk are in separate shards. Experts start on pages, and their tensors are
/// adjacent, in one shard.
fn verify_layout(manifest: &Manifest) {
    let limit = manifest.shards.iter().map(|s| s.size).max().unwrap();
    let mut expert_shards = std::collections::BTreeSet::new();
    for group in manifest.expert_groups() {
        let whole: u64 = group.parts.iter().map(|part| part.size).sum();
        assert_eq!(group.parts.len(), 3);
        assert_eq!(whole, group.size(), "adjacent, without a gap");
        assert!(group.pieces.iter().skip(1).all(|(_, range)| range.start() == 0));
        assert_eq!(group.pieces[0].1.start() % PAGE, 0);
        assert!(group.place().is_some() || group.size() > limit - PAGE, "it straddles shards");
        let order: Vec<&str> = group.parts.iter().map(|part| part.name.as_str()).collect();
        let ends = [["gate_proj.weight", "w1.weight"], ["up_proj.weight", "w3.weight"]];
        assert!(ends[0].iter().any(|end| order[0].ends_with(end)), "{order:?}");
        assert!(ends[1].iter().any(|end| order[1].ends_with(end)), "{order:?}");
        expert_shards.extend(group.pieces.iter().map(|(shard, _)| *shard));
    }
    for (name, tensor) in manifest.tensors.iter().filter(|(_, t)| t.role != Role::Expert) {
        assert!(tensor.spans.iter().all(|s| !expert_shards.contains(&s.shard)), "{name}");
        assert_eq!(tensor.expert(), None);
    }
}

const ALL: [Quantization; 4] =
    [Quantization::Keep, Quantization::Bf16, Quantization::Blocks(DType::Q8_0), Quantization::Q4KM];

#[test]
fn the_trained_models_convert_and_read_back() {
    for (model, experts) in [("tiny-mixtral", 32), ("tiny-qwen3moe", 64)] {
        let Some(source) = shared(&format!("models/{model}")) else { return };
        let dir = tempfile::tempdir().unwrap();
        for quantization in ALL {
            let out = dir.path().join(quantization.name());
            let start = Instant::now();
            let made = to_dir(&source, quantization, SHARD_BYTES_DEFAULT, &out).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            let read = verify(&out, &source, quantization);
            assert_eq!(read, made);
            assert_eq!(read.expert_groups().len(), experts);
            assert_eq!(read.eos_token_ids, [0]);
            let entry = read.tokenizer.clone().unwrap();
            let tokenizer = fs::read(out.join(&entry.file)).unwrap();
            assert_eq!(entry.size, Some(tokenizer.len() as u64));
            assert_eq!(entry.id, Some(ShardId::of(&tokenizer)));
            let original = fs::read(source.join("tokenizer.json")).unwrap();
            let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
            assert_eq!(json(&tokenizer), json(&original));
            let files = fs::read_dir(&out).unwrap();
            let total: u64 = files.map(|f| f.unwrap().metadata().unwrap().len()).sum();
            println!("{model} {quantization}: {total} bytes on disk in {seconds:.2} s");
            if quantization == Quantization::Q4KM {
                println!("{}", inspect(&read));
                assert!(total < 10_000_000 || model != "tiny-mixtral", "{total}");
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), ALL.len(), "nothing left behind");
    }
}

/// Ids are content addresses, so converting again must give the same model.
#[test]
fn converting_again_gives_the_embedded_model() {
    let Some(source) = shared("models/tiny-mixtral") else { return };
    let embedded = doppler_testing::root().join("models/tiny-mixtral-q4_k_m");
    let embedded = Manifest::read_dir(&embedded).unwrap();
    let out = tempfile::tempdir().unwrap();
    let again = to_dir(&source, Quantization::Q4KM, 1 << 20, &out.path().join("again")).unwrap();
    assert_eq!(again.model_id_hash(), embedded.model_id_hash());
}

#[test]
fn the_reference_checkpoints_convert_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for source in [references(false), references(true)].concat() {
        let name = source.file_name().unwrap().to_str().unwrap().to_owned();
        for quantization in ALL {
            let out = dir.path().join(format!("{name}-{quantization}"));
            let made = to_dir(&source, quantization, 64 * PAGE, &out).unwrap();
            let read = verify(&out, &source, quantization);
            assert_eq!((&read, read.tokenizer.as_ref()), (&made, None));
            assert_eq!(read.eos_token_ids, [2]);
        }
    }
}

#[test]
fn random_models_of_odd_sizes_fit_small_shards() {
    let mut rng = rng();
    let dir = tempfile::tempdir().unwrap();
    for round in 0..6 {
        let config = small_config(
            rng.random_range(1..4),
            2 * rng.random_range(8..70),
            rng.random_range(8..150),
            rng.random_range(2..10),
        );
        println!("{config}");
        let tensors = random_tensors(&config, &mut rng);
        let source = dir.path().join(format!("hf{round}"));
        write_checkpoint(&source, &config, &tensors, round % 2 == 0);
        for quantization in ALL {
            let shard = PAGE * rng.random_range(1..8);
            let out = dir.path().join(format!("{round}-{quantization}"));
            let manifest = to_dir(&source, quantization, shard, &out).unwrap();
            assert!(manifest.shards.iter().all(|s| s.size <= shard));
            assert_eq!(verify(&out, &source, quantization).eos_token_ids, [2, 3]);
        }
    }
}

#[tokio::test]
async fn memory_holds_the_same_model_and_reads_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, ..) = small_checkpoint(dir.path(), true);
    let (manifest, memory) = to_memory(&hf, Quantization::Blocks(DType::Q8_0)).unwrap();
    let out = dir.path().join("out");
    let on_disk =
        to_dir(&hf, Quantization::Blocks(DType::Q8_0), SHARD_BYTES_DEFAULT, &out).unwrap();
    assert_eq!(manifest, on_disk, "the same input gives the same bytes");
    let text = fs::read(out.join("manifest.json")).unwrap();
    assert_eq!(ModelId::of(&text), manifest.model_id_hash());
    assert_eq!(memory.get(manifest.model_id_hash().manifest()).unwrap(), text);
    for group in manifest.expert_groups() {
        let (shard, range) = group.place().unwrap();
        let id = manifest.shard_id(shard).unwrap();
        let found = memory.read(ReadRequest::token(id, range)).await.unwrap();
        let file = fs::read(out.join(&manifest.shards[shard as usize].filename)).unwrap();
        assert_eq!(found.bytes, file[range.start() as usize..range.end() as usize]);
    }
    let id = manifest.shard_id(0).unwrap();
    let past = ByteRange::new(0, manifest.shards[0].size + 1).unwrap();
    let error = memory.read(ReadRequest::token(id, past)).await.unwrap_err();
    assert!(matches!(error, ReadError::OutOfRange { .. }), "{error}");
    let unknown = ShardId::of(b"unknown");
    let error = memory.read(ReadRequest::token(unknown, past)).await.unwrap_err();
    assert!(matches!(error, ReadError::NotFound { .. }), "{error}");
}

#[test]
fn progress_rises_to_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, _, tensors) = small_checkpoint(dir.path(), false);
    let mut seen = Vec::new();
    let mut sink = MemorySink::default();
    let mut note = |p: Progress<'_>| seen.push((p.done, p.total));
    let hf = open(&hf).unwrap();
    convert(hf.as_ref(), Quantization::Q4KM, SHARD_BYTES_DEFAULT, &mut sink, &mut note).unwrap();
    let total: usize = tensors.values().map(|(_, bytes)| bytes.len()).sum();
    assert!(seen.is_sorted() && seen.len() == tensors.len() + 1);
    assert_eq!(seen.last(), Some(&(total as u64, total as u64)));
}

/// Breaks a valid checkpoint with `break_it` and converts it. Afterwards neither the output nor
/// anything beside it may exist, and the error must be one line.
fn refused(split: bool, break_it: impl FnOnce(&Path, Value, Tensors)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (hf, config, tensors) = small_checkpoint(dir.path(), split);
    break_it(&hf, config, tensors);
    let error = to_dir(&hf, Quantization::Q4KM, SHARD_BYTES_DEFAULT, &dir.path().join("out"));
    let text = error.expect_err("the broken checkpoint must be refused").to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only hf is left: {text}");
    text
}

fn has(text: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text:?}");
}

#[test]
fn broken_weight_files_are_refused_before_anything_is_written() {
    let file = "model.safetensors";
    let cut = |keep: fn(usize) -> usize| {
        refused(false, |hf, _, _| {
            let bytes = fs::read(hf.join(file)).unwrap();
            fs::write(hf.join(file), &bytes[..keep(bytes.len())]).unwrap();
        })
    };
    has(&cut(|n| n - 1), &[file, "truncated", "tensor model.norm.weight"]);
    has(&cut(|n| n / 500), &[file, "truncated", "header"]);
    has(&cut(|_| 5), &[file, "truncated"]);
    has(&cut(|_| 0), &[file, "truncated"]);
    has(&refused(false, |hf, _, _| fs::remove_file(hf.join(file)).unwrap()), &[file, "neither"]);
    let overwrite = |at: usize, with: Vec<u8>| {
        refused(false, move |hf, _, _| {
            let mut bytes = fs::read(hf.join(file)).unwrap();
            bytes[at..at + with.len()].copy_from_slice(&with);
            fs::write(hf.join(file), bytes).unwrap();
        })
    };
    has(&overwrite(0, vec![0xff; 8]), &[file, "header claims 18446744073709551615"]);
    has(&overwrite(8, b"[".to_vec()), &[file, "not JSON"]);
    let lie = |from: &'static str, to: &'static str| {
        refused(false, move |hf, _, _| {
            let bytes = fs::read(hf.join(file)).unwrap();
            let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header = std::str::from_utf8(&bytes[8..end]).unwrap();
            let header = header.replacen(from, to, 1);
            let mut out = (header.len() as u64).to_le_bytes().to_vec();
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&bytes[end..]);
            fs::write(hf.join(file), out).unwrap();
        })
    };
    has(&lie("[70,64]", "[70,65]"), &["lm_head.weight", "[70, 65]", "8960 bytes"]);
    has(&lie("[70,64]", "[64,70]"), &["lm_head.weight", "[64, 70]", "wants [70, 64]"]);
    has(&lie("[70,64]", "[18446744073709551615,2]"), &["lm_head.weight", "more than fits"]);
    has(&lie("[0,8960]", "[0,8959]"), &["lm_head.weight", "8959"]);
    has(&lie("[0,8960]", "[8960,0]"), &["lm_head.weight", "reversed"]);
    has(&lie("[0,8960]", "[0,99999999999]"), &["lm_head.weight", "truncated"]);
    has(&lie("BF16", "F8_E4M3"), &["lm_head.weight", "F8_E4M3"]);
    has(&lie("lm_head.weight", "lm_head.qweight"), &["lm_head.qweight", "not understood"]);
}

#[test]
fn an_index_that_does_not_hold_is_refused() {
    let index = "model.safetensors.index.json";
    has(
        &refused(true, |hf, _, _| fs::remove_file(hf.join("part-1.safetensors")).unwrap()),
        &[index, "part-1.safetensors", "not here"],
    );
    let edit = |from: &'static str, to: &'static str| {
        refused(true, move |hf, _, _| {
            let text = fs::read_to_string(hf.join(index)).unwrap();
            assert!(text.contains(from));
            fs::write(hf.join(index), text.replacen(from, to, 1)).unwrap();
        })
    };
    has(
        &edit("\"lm_head.weight\"", "\"lm_head.wait\""),
        &[index, "lm_head.wait", "does not have it"],
    );
    has(&edit("part-0.safetensors", "../part-0.safetensors"), &[index, "plain file name"]);
    has(&edit("weight_map", "weights"), &[index, "weight_map"]);
    has(&edit("{", "{{"), &[index]);
}

#[test]
fn configs_and_tensors_must_agree() {
    let rewrite = |change: fn(&mut Value, &mut Tensors)| {
        refused(false, move |hf, mut config, mut tensors| {
            change(&mut config, &mut tensors);
            write_checkpoint(hf, &config, &tensors, false);
        })
    };
    has(
        &rewrite(|config, _| config["architectures"] = json!(["NoSuchForCausalLM"])),
        &["NoSuchForCausalLM", "MixtralForCausalLM"],
    );
    has(&rewrite(|config, _| config["num_hidden_layers"] = json!(3)), &["layers.2.", "needs it"]);
    has(&rewrite(|config, _| config["num_local_experts"] = json!(2)), &["experts.2", "understood"]);
    has(&rewrite(|config, _| config["hidden_size"] = json!(32)), &["[", "wants"]);
    has(&rewrite(|config, _| config["eos_token_id"] = json!("end")), &["eos_token_id"]);
    let missing = "model.layers.1.self_attn.k_proj.weight";
    has(
        &rewrite(|_, t| drop(t.remove("model.layers.1.self_attn.k_proj.weight"))),
        &[missing, "does not have it"],
    );
    let text = rewrite(|_, tensors| {
        let bytes = &mut tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap().1;
        bytes[64 * 2 * 5 + 6..][..2].copy_from_slice(&bf16::NAN.to_le_bytes());
    });
    has(&text, &["layers.0.self_attn.q_proj.weight", "row 5", "element 3", "NaN"]);
    has(&refused(false, |hf, _, _| fs::remove_file(hf.join("config.json")).unwrap()), &["config"]);
    has(&refused(false, |hf, _, _| fs::write(hf.join("config.json"), "{").unwrap()), &["JSON"]);
    has(&refused(false, |hf, _, _| fs::write(hf.join("tokenizer.json"), "{").unwrap()), &["token"]);
}

#[test]
fn harmless_extras_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small_config(1, 64, 32, 2);
    config["tie_word_embeddings"] = json!(true);
    let mut tensors = random_tensors(&config, &mut rng());
    let table = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), table);
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tensors.insert(inv_freq.into(), (vec![8], vec![0; 16]));
    tensors.insert("mtp.fc.weight".into(), (vec![2, 4], vec![1; 16]));
    write_checkpoint(&dir.path().join("hf"), &config, &tensors, false);
    let (manifest, _) = to_memory(&dir.path().join("hf"), Quantization::Q4KM).unwrap();
    assert_eq!(manifest.tensors.len(), tensors.len() - 3);
    let table = manifest.tensors.get("model.embed_tokens.weight").unwrap();
    assert_eq!((&table.role, table.dtype), (&Role::Embedding, DType::Q8_0), "Q6_K of 64 columns");
}

#[test]
fn an_output_in_the_way_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, ..) = small_checkpoint(dir.path(), false);
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "keep me").unwrap();
    let convert =
        |out: &Path| to_dir(&hf, Quantization::Blocks(DType::Q8_0), SHARD_BYTES_DEFAULT, out);
    let error = convert(&out).unwrap_err().to_string();
    has(&error, &["out", "not an empty directory"]);
    assert_eq!(fs::read_to_string(out.join("mine")).unwrap(), "keep me");
    has(&convert(&out.join("mine")).unwrap_err().to_string(), &["not an empty directory"]);
    fs::remove_file(out.join("mine")).unwrap();
    convert(&out).unwrap();
    verify(&out, &hf, Quantization::Blocks(DType::Q8_0));
    let deep = dir.path().join("made/on/the/way");
    convert(&deep).unwrap();
    verify(&deep, &hf, Quantization::Blocks(DType::Q8_0));
    for bytes in [0, 100, PAGE + 1, SHARD_BYTES_DEFAULT + PAGE] {
        let error = to_dir(&hf, Quantization::Blocks(DType::Q8_0), bytes, &dir.path().join("x"))
            .unwrap_err();
        assert!(matches!(error, LoadError::ShardBytes(_)), "{error}");
    }
}

/// A weight that is not finite stops a conversion, whatever its tensor's stored type.
#[test]
fn weights_that_are_not_finite_are_refused_in_every_type_and_role() {
    for (tensor, row, column) in [
        ("model.embed_tokens.weight", 69, 63),
        ("model.layers.1.input_layernorm.weight", 0, 5),
        ("model.layers.0.block_sparse_moe.gate.weight", 2, 0),
        ("model.layers.1.block_sparse_moe.experts.2.w2.weight", 7, 95),
    ] {
        for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
            for quantization in ALL {
                let dir = tempfile::tempdir().unwrap();
                let (hf, config, mut tensors) = small_checkpoint(dir.path(), false);
                let (shape, bytes) = tensors.get_mut(tensor).unwrap();
                let at = 2 * (row * shape[shape.len() - 1] as usize + column);
                bytes[at..at + 2].copy_from_slice(&bad.to_le_bytes());
                write_checkpoint(&hf, &config, &tensors, false);
                let out = dir.path().join("out");
                let error = to_dir(&hf, quantization, SHARD_BYTES_DEFAULT, &out).unwrap_err();
                let place = format!("row {row}: element {column} is");
                has(&error.to_string(), &[tensor, &place, "not finite"]);
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only hf is left");
            }
        }
    }
}

/// The two versions of Transformers in use disagree on what such a model is.
#[test]
fn a_head_beside_tied_embeddings_must_be_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small_config(1, 64, 32, 2);
    config["tie_word_embeddings"] = json!(true);
    let mut tensors = random_tensors(&config, &mut rng());
    let table = tensors["model.embed_tokens.weight"].clone();
    let count = tensors.len();
    let hf = dir.path().join("hf");
    let mut convert_with = |head: (Vec<u64>, Vec<u8>)| {
        tensors.insert("lm_head.weight".into(), head);
        write_checkpoint(&hf, &config, &tensors, false);
        to_memory(&hf, Quantization::Bf16).map(|(manifest, _)| manifest.tensors.len())
    };
    assert_eq!(convert_with(table.clone()).unwrap(), count);
    let mut other = table.clone();
    *other.1.last_mut().unwrap() ^= 1;
    let shorter = (vec![69, 64], table.1[..69 * 64 * 2].to_vec());
    for head in [other, shorter] {
        let error = convert_with(head).unwrap_err().to_string();
        has(&error, &["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"]);
    }
}

fn tokenizer() -> Value {
    let file = doppler_testing::root().join("models/tiny-mixtral-q4_k_m/tokenizer.json");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

#[test]
fn a_tokenizer_is_stored_without_its_limits_and_refused_if_it_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, ..) = small_checkpoint(dir.path(), false);
    let plain = tokenizer();
    let mut limited = plain.clone();
    limited["truncation"] = json!({
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    });
    limited["padding"] = json!({
        "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    });
    let stored = |file: &Value| {
        fs::write(hf.join("tokenizer.json"), file.to_string()).unwrap();
        let (manifest, memory) = to_memory(&hf, Quantization::Bf16).unwrap();
        memory.get(manifest.tokenizer.as_ref().unwrap().id.unwrap()).unwrap()
    };
    assert_eq!(stored(&limited), stored(&plain), "identical bytes, so the same id");
    for rubbish in [json!({}), json!({ "model": { "type": "NoSuchModel" } })] {
        fs::write(hf.join("tokenizer.json"), rubbish.to_string()).unwrap();
        let out = dir.path().join("out");
        let error = to_dir(&hf, Quantization::Bf16, SHARD_BYTES_DEFAULT, &out).unwrap_err();
        has(&error.to_string(), &["tokenizer.json", "not usable", "without a tokenizer"]);
        assert!(!out.exists());
    }
}

/// A model fetched from elsewhere has its template: it is in the manifest. Models without one keep
/// their id, because nothing is written.
#[test]
fn a_chat_template_travels_in_the_manifest_and_none_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, ..) = small_checkpoint(dir.path(), false);
    let (plain, _) = to_memory(&hf, Quantization::Bf16).unwrap();
    assert!(plain.chat.is_none());
    assert!(!String::from_utf8(plain.to_json_bytes()).unwrap().contains("chatTemplates"));
    fs::write(hf.join("chat_template.jinja"), "{{ bos_token }}{{ messages }}").unwrap();
    fs::write(hf.join("tokenizer_config.json"), r#"{ "bos_token": "<s>" }"#).unwrap();
    let out = dir.path().join("out");
    let with = to_dir(&hf, Quantization::Bf16, SHARD_BYTES_DEFAULT, &out).unwrap();
    assert_ne!(with.model_id_hash(), plain.model_id_hash());
    let read = Manifest::read_dir(&out).unwrap();
    assert_eq!(read.model_id_hash(), with.model_id_hash());
    let chat = read.chat.as_ref().unwrap();
    assert_eq!(chat.templates["default"], "{{ bos_token }}{{ messages }}");
    assert_eq!(chat.tokens["bos_token"], "<s>");
    // Converted again, from RDRR.
    let (again, _) = to_memory(&out, Quantization::Keep).unwrap();
    assert_eq!(again.chat, read.chat);
    fs::write(hf.join("tokenizer_config.json"), r#"{ "chat_template": 3 }"#).unwrap();
    fs::remove_file(hf.join("chat_template.jinja")).unwrap();
    let error = to_memory(&hf, Quantization::Bf16).map(|_| ()).unwrap_err().to_string();
    has(&error, &["tokenizer_config.json", "chat_template"]);
}

#[test]
fn a_git_lfs_pointer_is_named_as_one() {
    let pointer = "version https://git-lfs.github.com/spec/v1\n\
                   oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n\
                   size 4976698672\n";
    for (file, split) in [
        ("model.safetensors", false),
        ("part-1.safetensors", true),
        ("model.safetensors.index.json", true),
        ("tokenizer.json", false),
        ("config.json", false),
    ] {
        let error = refused(split, |hf, _, _| fs::write(hf.join(file), pointer).unwrap());
        has(&error, &[file, "a Git LFS pointer", "4976698672 bytes", "git lfs pull"]);
    }
}

/// An RDRR directory is a checkpoint like any other.
#[test]
fn an_rdrr_directory_converts_as_what_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let (hf, ..) = small_checkpoint(dir.path(), true);
    fs::write(hf.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let kept = dir.path().join("kept");
    to_dir(&hf, Quantization::Keep, 3 * PAGE, &kept).unwrap();
    for quantization in ALL {
        let (direct, _) = to_memory(&hf, quantization).unwrap();
        let (again, _) = to_memory(&kept, quantization).unwrap();
        assert_eq!(again.shards, direct.shards);
        assert_eq!((&again.tensors, &again.tokenizer), (&direct.tensors, &direct.tokenizer));
        assert_eq!((&again.config, &again.eos_token_ids), (&direct.config, &direct.eos_token_ids));
    }
    let small = dir.path().join("small");
    to_dir(&hf, Quantization::Q4KM, 3 * PAGE, &small).unwrap();
    let error = to_memory(&small, Quantization::Blocks(DType::Q8_0)).unwrap_err().to_string();
    has(&error, &["already", "convert the original"]);

    let shard = kept.join("shard_00001.bin");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[9] ^= 4;
    fs::write(&shard, bytes).unwrap();
    let error = to_memory(&kept, Quantization::Keep).unwrap_err().to_string();
    has(&error, &["shard_00001.bin", "damaged"]);
    fs::write(small.join("tokenizer.json"), "{}").unwrap();
    has(
        &open(&small).unwrap().tokenizer().unwrap_err().to_string(),
        &["tokenizer.json", "not the"],
    );
}
