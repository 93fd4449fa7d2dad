//! Models in memory for tests, of any config, with weights from a function or a checkpoint.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use safetensors::SafeTensors;
use serde_json::Value;
use tokio::runtime::Runtime;

use super::families::{self, FamilyError};
use super::graph::Weight;
use super::load::{self, MemorySink, Quantization};
use super::model::Model;
use super::quant::quantize;
use super::reader::WeightReader;
use doppler_store::manifest::{HashAlgorithm, ManifestBody, Role, Shard, ShardHash, Span};
use doppler_store::manifest::{TensorEntry, Tensors};
use doppler_store::{
    DType, Found, Manifest, Priority, RangeReader, ReadError, ReadRequest, ShardId, Tier,
};

/// The runtime for the tests' readers.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().expect("a runtime"))
}

/// Shards in memory that claim to be on disk. Can be told to fail reads.
#[derive(Default)]
pub struct MemoryReader {
    shards: HashMap<ShardId, Bytes>,
    pub broken: AtomicBool,
    /// Fail reads that nobody waits for yet.
    pub breaks_ahead: AtomicBool,
}

impl RangeReader for MemoryReader {
    fn read(&self, request: ReadRequest) -> BoxFuture<'_, Result<Found, ReadError>> {
        let shard = self.shards.get(&request.shard);
        let broken = self.broken.load(Ordering::Relaxed)
            || request.priority != Priority::Token && self.breaks_ahead.load(Ordering::Relaxed);
        let shard = shard.filter(|_| !broken);
        let range = request.range.start() as usize..request.range.end() as usize;
        let found = shard.map(|bytes| Found { bytes: bytes.slice(range), tier: Tier::Disk });
        let missing = ReadError::NotFound { shard: request.shard, waited: Default::default() };
        Box::pin(async move { found.ok_or(missing) })
    }
}

/// A tensor of the model to build.
pub struct Wanted<'a> {
    pub name: &'a str,
    pub rows: usize,
    pub cols: usize,
}

/// Shards being filled: first the trunk's, then the experts'.
#[derive(Default)]
struct Builder {
    shards: Vec<Vec<u8>>,
    tensors: Tensors,
}

impl Builder {
    fn add(&mut self, wanted: &Wanted<'_>, dtype: DType, bytes: &[u8], group: &str, role: Role) {
        let room = |shard: &Vec<u8>| shard.len() + bytes.len() <= 32 << 20;
        if !self.shards.last().is_some_and(room) {
            self.shards.push(Vec::new());
        }
        let index = self.shards.len() - 1;
        let shard = &mut self.shards[index];
        let span =
            Span { shard: index as u32, offset: shard.len() as u64, size: bytes.len() as u64 };
        shard.extend_from_slice(bytes);
        let shape = match wanted.rows {
            1 => vec![wanted.cols as u64],
            rows => vec![rows as u64, wanted.cols as u64],
        };
        let entry = TensorEntry {
            spans: vec![span],
            size: span.size,
            shape,
            dtype,
            role,
            group: group.to_owned(),
            layout: dtype.is_quantised().then(|| "row".to_owned()),
        };
        self.tensors.insert(wanted.name.to_owned(), entry).unwrap();
    }
}

/// Stores rows as `quantize` does, but accepts weights that are not finite: such a weight is
/// written as it is or becomes the scale of its block.
fn store(dtype: DType, values: &[f32], cols: usize) -> Vec<u8> {
    let sound = |value: &f32| if value.is_finite() { *value } else { 0.0 };
    let mut bytes = Vec::new();
    for row in values.chunks_exact(cols) {
        let row: Vec<f32> = row.iter().map(sound).collect();
        quantize(dtype, &row, &mut bytes).unwrap();
    }
    for (i, odd) in values.iter().enumerate().filter(|(_, value)| !value.is_finite()) {
        let block = (i / cols * cols.div_ceil(dtype.block_len())) + i % cols / dtype.block_len();
        let block = &mut bytes[block * dtype.block_bytes()..][..dtype.block_bytes()];
        match dtype {
            DType::F32 => block.copy_from_slice(&odd.to_le_bytes()),
            DType::Bf16 => block.copy_from_slice(&half::bf16::from_f32(*odd).to_le_bytes()),
            // Q6_K has its scale at the end of the block, the others at the start.
            DType::Q6K => block[208..].copy_from_slice(&half::f16::from_f32(*odd).to_le_bytes()),
            _ => block[..2].copy_from_slice(&half::f16::from_f32(*odd).to_le_bytes()),
        }
    }
    bytes
}

/// A model of this config whose tensors come from `values`, stored as `dtype` says.
pub fn model(
    config: &Value,
    mut values: impl FnMut(&Wanted<'_>) -> Vec<f32>,
    dtype: impl Fn(&Wanted<'_>) -> DType,
) -> (Model, Arc<MemoryReader>) {
    let graph = families::read(config).unwrap().graph;
    let mut builder = Builder::default();
    let mut add = |builder: &mut Builder, wanted: &Wanted<'_>, group: &str, role: Role| {
        let values = values(wanted);
        assert_eq!(values.len(), wanted.rows * wanted.cols, "{}", wanted.name);
        let dtype = dtype(wanted);
        let bytes = store(dtype, &values, wanted.cols);
        builder.add(wanted, dtype, &bytes, group, role);
    };
    for weight in &graph.weights {
        let wanted = Wanted { name: &weight.tensor, rows: weight.rows, cols: weight.cols };
        add(&mut builder, &wanted, "trunk", Role::Other);
    }
    builder.shards.push(Vec::new());
    for moe in &graph.moe {
        for number in 0..moe.experts.len() {
            let group = format!("layer.{}.expert.{number}", moe.layer);
            for Weight { tensor, rows, cols, .. } in moe.weights(number) {
                let wanted = Wanted { name: &tensor, rows, cols };
                add(&mut builder, &wanted, &group, Role::Expert);
            }
        }
    }
    builder.shards.retain(|shard| !shard.is_empty());
    let mut offset = 0;
    let mut reader = MemoryReader::default();
    let shards = builder.shards.into_iter().enumerate().map(|(index, bytes)| {
        let shard = Shard {
            index: index as u32,
            filename: format!("shard_{index:05}.bin"),
            size: bytes.len() as u64,
            hash: ShardHash::of(HashAlgorithm::Blake3, &bytes),
            offset,
        };
        offset += shard.size;
        reader.shards.insert(ShardId::of(&bytes), Bytes::from(bytes));
        shard
    });
    let body = ManifestBody {
        version: 1,
        model_id: "test".into(),
        model_type: "transformer".into(),
        quantization: "test".into(),
        architecture: Default::default(),
        moe: None,
        inference: Value::Null,
        config: config.clone(),
        shards: shards.collect(),
        tensors: builder.tensors,
        total_size: offset,
        eos_token_ids: Vec::new(),
        tokenizer: None,
        chat: None,
    };
    let reader = Arc::new(reader);
    let weights = WeightReader::new(reader.clone(), runtime().handle().clone());
    (Model::open(Manifest::new(body).unwrap(), weights).unwrap(), reader)
}

/// A model of random weights, small enough that activations stay tame.
pub fn random(config: &Value, seed: u64, dtype: impl Fn(&Wanted<'_>) -> DType) -> Model {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = |wanted: &Wanted<'_>| {
        let scale = if wanted.rows == 1 { 1.0 } else { 2.0 / (wanted.cols as f32).sqrt() };
        (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-scale..scale)).collect()
    };
    model(config, values, dtype).0
}

/// A checkpoint converted in memory.
pub fn converted(dir: &Path, quantization: Quantization, shard_bytes: u64) -> Model {
    let mut sink = MemorySink::default();
    let source = load::open(dir).unwrap();
    let manifest =
        load::convert(source.as_ref(), quantization, shard_bytes, &mut sink, &mut |_| {}).unwrap();
    let reader = WeightReader::new(Arc::new(sink), runtime().handle().clone());
    Model::open(manifest, reader).unwrap()
}

/// Whether a reference's logits are so insensitive that a half-precision cache stays within the
/// bound for f32. True for the first collection, but for one with four layers and steep logits
/// (1.2e-3), one that does not scale its scores, one whose keys longrope stretches (1.2e-3), one
/// whose keys and values are made from a latent row (1.3e-3), one with layer norms before its
/// routers (1.03e-3), and one whose keys YaRN stretches (1.1e-3).
pub fn keeps_in_half_precision(dir: &Path) -> bool {
    let is_first = doppler_testing::shared("goldens").is_some_and(|first| dir.starts_with(first));
    let wide = ["smollm3", "granite-moe", "phi3-longrope", "deepseek-v3", "phimoe", "gpt-oss"];
    is_first && !wide.iter().any(|name| dir.ends_with(name))
}

/// The reference checkpoints of known families, with or without experts. Of a known family, only
/// checkpoints that are refused as unsupported are left out.
pub fn references(with_experts: bool) -> Vec<PathBuf> {
    let wanted = |dir: &PathBuf| {
        let checkpoint = load::open(dir).unwrap_or_else(|error| panic!("{error}"));
        // Packed ones are in a list of their own.
        if checkpoint.quantization().is_some() {
            return false;
        }
        // A model that embeds with files beside it is a text model by itself.
        let mut config = checkpoint.config().clone();
        config.as_object_mut().expect("an object").remove(families::SENTENCE_KEY);
        match families::read(&config) {
            Ok(program) => {
                program.embedding.is_none() && program.graph.moe.is_empty() != with_experts
            }
            Err(
                error @ (FamilyError::UnknownArchitecture { .. } | FamilyError::Unsupported { .. }),
            ) => {
                let name = dir.file_name().unwrap_or_default().display();
                println!("left out: {name}: {}", error.to_string().split(" (").next().unwrap());
                false
            }
            Err(error) => panic!("{}: {error}", dir.display()),
        }
    };
    doppler_testing::references().into_iter().filter(wanted).collect()
}

/// The reference checkpoints of embedding models.
pub fn embedding_references() -> Vec<PathBuf> {
    let wanted = |dir: &PathBuf| {
        let config = std::fs::read(dir.join("config.json")).unwrap();
        let read = families::read(&serde_json::from_slice(&config).unwrap());
        read.is_ok_and(|program| program.embedding.is_some())
    };
    doppler_testing::references().into_iter().filter(wanted).collect()
}

/// The reference checkpoints whose matrices are packed, of known families.
pub fn packed_references() -> Vec<PathBuf> {
    let packed = |dir: &PathBuf| {
        let checkpoint = load::open(dir).unwrap_or_else(|error| panic!("{error}"));
        match families::read(checkpoint.config()) {
            _ if checkpoint.quantization().is_none() => false,
            Ok(_) => true,
            Err(FamilyError::UnknownArchitecture { name, .. }) => {
                println!("left out: {}: {name}", dir.display());
                false
            }
            Err(error) => panic!("{}: {error}", dir.display()),
        }
    };
    let all = doppler_testing::references().into_iter();
    all.filter(|dir| dir.parent().is_some_and(|dir| dir.ends_with("formats")))
        .filter(packed)
        .collect()
}

/// The directories of GGUF files with reference outputs. Left out are big-endian files and
/// architectures without a family.
pub fn gguf_references() -> Vec<PathBuf> {
    let known = |dir: &PathBuf| match load::open(&dir.join("model.gguf")) {
        Ok(_) => true,
        Err(error) => {
            let (name, error) = (dir.display(), error.to_string());
            let left_out = error.contains("unknown architecture") || error.contains("big-endian");
            assert!(left_out, "{name}: {error}");
            println!("left out: {name}: {error}");
            false
        }
    };
    doppler_testing::gguf_references().into_iter().filter(known).collect()
}

/// A checkpoint in the Hugging Face layout, with its bf16 weights unchanged.
pub fn checkpoint(dir: &Path, dtype: impl Fn(&Wanted<'_>) -> DType) -> Model {
    let config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("model") && name.ends_with(".safetensors")
        })
        .collect();
    files.sort();
    let mut tensors: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for file in files {
        let bytes = std::fs::read(file).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let (halves, _) = tensor.data().as_chunks::<2>();
            let values = halves.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32());
            tensors.insert(name, values.collect());
        }
    }
    model(&config, |wanted| tensors[wanted.name].clone(), dtype).0
}
