//! A Hugging Face checkpoint to RDRR, streaming: at most one shard, and a few
//! rows of one tensor, are in memory at a time.
//!
//! What is stored is what the model's graph asks for, by name and shape: a
//! tensor that is missing, misshapen or not understood stops the conversion
//! before anything is written. The same input gives the same bytes.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;

use super::hf::{Checkpoint, Source};
use super::layout::{EXPERT_ALIGN, Item, Plan, place};
use super::mixture::{Kind, Mixture, Quantization};
use super::sink::ShardSink;
use super::{LoadError, Result, describe};
use crate::families::{self, Spec};
use crate::graph::{Graph, Op, Weight};
use crate::quant::{dequantize, quantize};
use doppler_store::manifest::{
    HashAlgorithm, ManifestBody, Role, Shard, ShardHash, Span, TensorEntry, Tensors,
    TokenizerEntry, read_eos,
};
use doppler_store::verified::OBJECT_BYTES_MAX;
use doppler_store::{DType, Manifest, ShardId};

/// RDRR's shard size, bytes.
pub const SHARD_BYTES_DEFAULT: u64 = OBJECT_BYTES_MAX;

/// Source bytes read at a time: enough rows to keep every core busy.
const CHUNK_BYTES: u64 = 4 << 20;

/// How far a conversion is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The tensor being stored.
    pub tensor: &'a str,
    /// Source bytes done, and of how many.
    pub done: u64,
    pub total: u64,
}

/// Converts the checkpoint in `hf_dir` into shards of at most `shard_bytes`
/// (a multiple of 4 KiB up to 64 MiB) and a manifest, given to `sink`.
///
/// # Errors
/// One line naming the file or tensor. Nothing has been given to the sink when
/// the config, the architecture, a header or a shape is at fault.
pub fn convert(
    hf_dir: &Path,
    quantization: Quantization,
    shard_bytes: u64,
    sink: &mut dyn ShardSink,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Manifest> {
    check_shard_bytes(shard_bytes)?;
    let spec = families::from_config(&Checkpoint::read_config(hf_dir)?)?;
    let checkpoint = Checkpoint::open(hf_dir)?;
    let graph = families::graph(&spec);
    refuse_strangers(&checkpoint, &graph, &spec)?;
    let stored_as = |weight: &Weight| {
        let source = checkpoint.tensor(&weight.tensor)?;
        check_shape(weight, source)?;
        Ok((source.shape.clone(), source.dtype))
    };
    let plan = plan(&stored_as, &graph, &spec, quantization, shard_bytes)?;
    let tokenizer = read_tokenizer(&checkpoint)?;
    let configs = [&checkpoint.generation_config, &checkpoint.config];
    let body = body(configs, &spec, quantization, model_id(hf_dir, quantization))?;
    // The plan must be a valid manifest before it is carried out.
    Manifest::new(with_tensors(body.clone(), &plan, planned_shards(&plan), None)?)?;

    let shards = store(&checkpoint, &plan, sink, progress)?;
    let tokenizer = match tokenizer {
        None => None,
        Some(bytes) => {
            let (size, id) = (Some(bytes.len() as u64), Some(ShardId::of(&bytes)));
            sink.file(TOKENIZER_FILE, bytes)?;
            Some(TokenizerEntry { file: TOKENIZER_FILE.into(), size, id })
        }
    };
    let manifest = Manifest::new(with_tensors(body, &plan, shards, tokenizer)?)?;
    sink.finish(manifest.to_json_bytes())?;
    Ok(manifest)
}

/// Refuses a shard size that is no whole number of pages, or more than an object may have.
pub(super) fn check_shard_bytes(shard_bytes: u64) -> Result<()> {
    let page = shard_bytes.is_multiple_of(EXPERT_ALIGN);
    if !page || !(EXPERT_ALIGN..=OBJECT_BYTES_MAX).contains(&shard_bytes) {
        return Err(LoadError::ShardBytes(shard_bytes));
    }
    Ok(())
}

const TOKENIZER_FILE: &str = "tokenizer.json";

/// `NAME-q4_k_m` after the checkpoint's directory.
fn model_id(hf_dir: &Path, quantization: Quantization) -> String {
    let full = std::path::absolute(hf_dir).unwrap_or_else(|_| hf_dir.to_owned());
    let name = full.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = name.chars().take(128).map(plain).collect();
    format!("{name}-{quantization}")
}

/// Refuses tensors that no part of the graph reads: leaving one out would
/// change what the model says.
fn refuse_strangers(checkpoint: &Checkpoint, graph: &Graph, spec: &Spec) -> Result<()> {
    let mut known: HashSet<&str> = graph.weights.iter().map(|w| w.tensor.as_str()).collect();
    for expert in graph.moe.iter().flat_map(|moe| &moe.experts) {
        known.extend([expert.gate.as_str(), &expert.up, &expert.down]);
    }
    let harmless = |name: &str| {
        // Computed from the config; a copy of the tied embedding.
        name.ends_with(".rotary_emb.inv_freq")
            || spec.tie_word_embeddings && name == "lm_head.weight"
    };
    match checkpoint.names().find(|name| !known.contains(name) && !harmless(name)) {
        None => Ok(()),
        Some(name) => Err(LoadError::Tensor {
            tensor: name.to_owned(),
            problem: format!("no part of a {} model: not understood", spec.family),
        }),
    }
}

/// A tensor's shape and type before quantization.
pub(super) type Original<'a> = dyn Fn(&Weight) -> Result<(Vec<u64>, DType)> + 'a;

/// Places every tensor the graph reads; `source` gives its shape and type before quantization.
pub(super) fn plan(
    source: &Original<'_>,
    graph: &Graph,
    spec: &Spec,
    quantization: Quantization,
    shard_bytes: u64,
) -> Result<Plan> {
    let experts = spec.moe.as_ref().map_or(0, |moe| moe.experts);
    let mixture = Mixture { quantization, layers: spec.layers, experts };
    let roles = roles(graph);
    let item = |weight: &Weight, role: &Role, layer: Option<usize>, group: String| {
        let (shape, dtype) = source(weight)?;
        let kind = kind(&weight.tensor, role, spec);
        let dtype = mixture.dtype(kind, layer, dtype, weight.cols as u64);
        // Bounded by the config's limits on dimensions: 2^20 * 2^20 * 4.
        let size = weight.rows as u64 * dtype.row_bytes(weight.cols) as u64;
        let name = weight.tensor.clone();
        Ok::<_, LoadError>(Item { name, shape, dtype, size, role: role.clone(), group })
    };
    let mut trunk = Vec::with_capacity(graph.weights.len());
    for weight in &graph.weights {
        let role = roles.get(weight.tensor.as_str()).unwrap_or(&Role::Other);
        let layer = layer_of(&weight.tensor);
        let group = match (layer, role) {
            (Some(layer), _) => format!("layer.{layer}"),
            (None, Role::Embedding) => "embed".to_owned(),
            (None, _) => "head".to_owned(),
        };
        trunk.push(item(weight, role, layer, group)?);
    }
    let mut experts = Vec::new();
    for moe in &graph.moe {
        for (number, names) in moe.experts.iter().enumerate() {
            let group = format!("layer.{}.expert.{number}", moe.layer);
            let part = |tensor: &String, rows, cols| {
                let weight = Weight { tensor: tensor.clone(), rows, cols };
                item(&weight, &Role::Expert, Some(moe.layer), group.clone())
            };
            experts.push(vec![
                part(&names.gate, moe.ff, moe.hidden)?,
                part(&names.up, moe.ff, moe.hidden)?,
                part(&names.down, moe.hidden, moe.ff)?,
            ]);
        }
    }
    Ok(place(trunk, experts, shard_bytes))
}

/// What each trunk tensor is for, from the ops that read it.
fn roles(graph: &Graph) -> BTreeMap<&str, Role> {
    let mut roles = BTreeMap::new();
    let routed: HashSet<_> = graph
        .ops
        .iter()
        .filter_map(|op| if let Op::Route { logits, .. } = op { Some(*logits) } else { None })
        .collect();
    for op in &graph.ops {
        let (weight, role) = match op {
            Op::Embed { table, .. } => (*table, Role::Embedding),
            Op::RmsNorm { weight, .. } => (*weight, Role::Norm),
            Op::Linear { weight, out, .. } if routed.contains(out) => (*weight, Role::Router),
            Op::Linear { weight, .. } => (*weight, Role::Matmul),
            Op::Logits { weight, .. } => (*weight, Role::LmHead),
            _ => continue,
        };
        // A tied embedding is first an embedding.
        roles.entry(graph.weight_spec(weight).tensor.as_str()).or_insert(role);
    }
    roles
}

/// The routers' names, layer by layer.
pub(super) fn routers(graph: &Graph) -> Vec<String> {
    let roles = roles(graph);
    let routers = graph.weights.iter().map(|weight| &weight.tensor);
    routers.filter(|name| roles.get(name.as_str()) == Some(&Role::Router)).cloned().collect()
}

fn kind(name: &str, role: &Role, spec: &Spec) -> Kind {
    match role {
        Role::Embedding if spec.tie_word_embeddings => Kind::Output,
        Role::Embedding => Kind::Embedding,
        Role::LmHead => Kind::Output,
        Role::Matmul | Role::Expert => {
            let ends = |endings: &[&str]| endings.iter().any(|end| name.ends_with(end));
            match () {
                () if ends(&[".k_proj.weight"]) => Kind::AttentionKey,
                () if ends(&[".v_proj.weight"]) => Kind::AttentionValue,
                () if ends(&[".o_proj.weight"]) => Kind::AttentionOutput,
                () if ends(&[".down_proj.weight", ".w2.weight"]) => Kind::FeedForwardDown,
                () => Kind::Matrix,
            }
        }
        _ => Kind::Kept,
    }
}

/// The number in `...layers.N....`.
fn layer_of(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// `[rows, cols]`, or `[cols]` for a vector.
fn check_shape(weight: &Weight, source: &Source) -> Result<()> {
    let (rows, cols) = (weight.rows as u64, weight.cols as u64);
    if source.shape == [rows, cols] || (rows == 1 && source.shape == [cols]) {
        return Ok(());
    }
    let want = if rows == 1 { format!("[{cols}]") } else { format!("[{rows}, {cols}]") };
    Err(LoadError::Tensor {
        tensor: weight.tensor.clone(),
        problem: format!("its shape is {:?}, the config wants {want}", source.shape),
    })
}

/// The tokenizer without the white space between its JSON tokens.
fn read_tokenizer(checkpoint: &Checkpoint) -> Result<Option<Vec<u8>>> {
    let Some(bytes) = checkpoint.file(TOKENIZER_FILE)? else { return Ok(None) };
    if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes) {
        let problem = format!("not valid JSON: {error}");
        return Err(LoadError::File { file: TOKENIZER_FILE.into(), problem });
    }
    Ok(Some(compact_json(&bytes)))
}

/// Drops white space outside strings; numbers and strings stay as written.
fn compact_json(json: &[u8]) -> Vec<u8> {
    let (mut quoted, mut escaped) = (false, false);
    let mut keep = |byte: u8| {
        if quoted {
            quoted = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            return true;
        }
        quoted = byte == b'"';
        !byte.is_ascii_whitespace()
    };
    json.iter().copied().filter(|&byte| keep(byte)).collect()
}

/// The manifest but for shards, tensors and tokenizer.
/// End-of-sequence tokens are those of the first config that has any; the last
/// config is the model's own.
pub(super) fn body(
    configs: [&Value; 2],
    spec: &Spec,
    quantization: Quantization,
    model_id: String,
) -> Result<ManifestBody> {
    let key = "eos_token_id";
    let eos =
        configs.into_iter().filter_map(|config| config.get(key)).find(|value| !value.is_null());
    Ok(ManifestBody {
        version: 1,
        model_id,
        model_type: spec.family.to_owned(),
        quantization: quantization.rdrr_name().to_owned(),
        architecture: describe::architecture(spec),
        moe: describe::moe_config(spec),
        inference: describe::inference(spec),
        config: configs[1].clone(),
        shards: Vec::new(),
        tensors: Tensors::default(),
        total_size: 0,
        eos_token_ids: read_eos(eos.unwrap_or(&Value::Null))?,
        tokenizer: None,
    })
}

pub(super) fn with_tensors(
    mut body: ManifestBody,
    plan: &Plan,
    shards: Vec<Shard>,
    tokenizer: Option<TokenizerEntry>,
) -> Result<ManifestBody> {
    for (name, tensor) in &plan.tensors {
        body.tensors.insert(name.clone(), tensor.clone())?;
    }
    body.total_size = plan.shards.iter().sum();
    (body.shards, body.tokenizer) = (shards, tokenizer);
    Ok(body)
}

/// The shards before they have contents: every hash zero.
pub(super) fn planned_shards(plan: &Plan) -> Vec<Shard> {
    let hash = ShardHash { algorithm: HashAlgorithm::Blake3, bytes: [0; 32] };
    let mut shards = Vec::new();
    for &size in &plan.shards {
        shards.push(next_shard(&shards, size, hash));
    }
    shards
}

fn next_shard(before: &[Shard], size: u64, hash: ShardHash) -> Shard {
    let index = before.len() as u32; // a plan is checked to have at most 65,536
    let offset = before.iter().map(|shard| shard.size).sum();
    Shard { index, filename: format!("shard_{index:05}.bin"), size, hash, offset }
}

/// Carries the plan out: reads, quantizes, fills shard after shard.
fn store(
    checkpoint: &Checkpoint,
    plan: &Plan,
    sink: &mut dyn ShardSink,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Shard>> {
    let mut sources = Vec::with_capacity(plan.tensors.len());
    for (name, _) in &plan.tensors {
        sources.push(checkpoint.tensor(name)?);
    }
    let total = sources.iter().map(|source| source.size).sum();
    let mut done = 0;
    let mut writer = Writer::new(&plan.shards, sink);
    for ((name, tensor), source) in plan.tensors.iter().zip(sources) {
        progress(Progress { tensor: name, done, total });
        let mut place = Place { spans: &tensor.spans, filled: 0 };
        store_tensor(checkpoint, name, tensor, source, &mut |bytes| {
            writer.append(&mut place, bytes)
        })?;
        done += source.size;
    }
    writer.close()?;
    progress(Progress { tensor: "", done, total });
    Ok(writer.shards)
}

/// Gives a tensor's stored bytes to `out`, some rows at a time.
fn store_tensor(
    checkpoint: &Checkpoint,
    name: &str,
    tensor: &TensorEntry,
    source: &Source,
    out: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = tensor.rows_cols();
    let row_in = source.size / rows;
    let row_out = tensor.size / rows;
    let step = (CHUNK_BYTES / row_in.max(row_out)).clamp(1, rows);
    let mut read = vec![0; (step * row_in) as usize];
    let mut stored = vec![0; (step * row_out) as usize];
    let mut first = 0;
    while first < rows {
        let count = step.min(rows - first);
        let read = &mut read[..(count * row_in) as usize];
        checkpoint.read(source, first * row_in, read)?;
        if source.dtype == tensor.dtype {
            out(read)?;
        } else {
            let stored = &mut stored[..(count * row_out) as usize];
            let types = (source.dtype, tensor.dtype);
            requantize(types, cols as usize, read, stored).map_err(|(row, source)| {
                LoadError::Quantize { tensor: name.to_owned(), row: first + row as u64, source }
            })?;
            out(stored)?;
        }
        first += count;
    }
    Ok(())
}

/// Turns whole rows from one type into another, rows in parallel.
fn requantize(
    (from, to): (DType, DType),
    cols: usize,
    read: &[u8],
    stored: &mut [u8],
) -> std::result::Result<(), (usize, crate::quant::QuantizeError)> {
    let rows = read.par_chunks_exact(from.row_bytes(cols));
    let outs = stored.par_chunks_exact_mut(to.row_bytes(cols));
    rows.zip(outs).enumerate().try_for_each_init(
        || (vec![0.0; cols], Vec::new()),
        |(weights, bytes), (row, (read, stored))| {
            dequantize(from, read, cols, weights);
            bytes.clear();
            quantize(to, weights, bytes).map_err(|error| (row, error))?;
            stored.copy_from_slice(bytes);
            Ok(())
        },
    )
}

/// How much of a tensor's spans is filled.
pub(super) struct Place<'a> {
    pub spans: &'a [Span],
    /// Bytes of the first of `spans`.
    pub filled: u64,
}

/// Fills shards in order and hands each to the sink with its hash.
pub(super) struct Writer<'a> {
    sizes: &'a [u64],
    pub shards: Vec<Shard>,
    /// The shard being filled.
    buffer: Vec<u8>,
    sink: &'a mut dyn ShardSink,
}

impl<'a> Writer<'a> {
    pub fn new(sizes: &'a [u64], sink: &'a mut dyn ShardSink) -> Self {
        Self { sizes, shards: Vec::new(), buffer: Vec::new(), sink }
    }

    pub fn append(&mut self, place: &mut Place<'_>, mut bytes: &[u8]) -> Result<()> {
        while let Some((span, rest)) = place.spans.split_first().filter(|_| !bytes.is_empty()) {
            if self.shards.len() < span.shard as usize {
                self.close()?;
            }
            // Zeros between the last tensor and this one.
            self.buffer.resize((span.offset + place.filled) as usize, 0);
            let left = usize::try_from(span.size - place.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            place.filled += now.len() as u64;
            if place.filled == span.size {
                *place = Place { spans: rest, filled: 0 };
            }
            bytes = later;
        }
        Ok(())
    }

    /// Hands over the shard being filled.
    pub fn close(&mut self) -> Result<()> {
        let size = self.sizes[self.shards.len()];
        debug_assert_eq!(self.buffer.len() as u64, size);
        let bytes = std::mem::take(&mut self.buffer);
        let hash = ShardHash::of(HashAlgorithm::Blake3, &bytes);
        let shard = next_shard(&self.shards, size, hash);
        self.sink.shard(&shard.filename, ShardId::from(hash.bytes), bytes)?;
        self.shards.push(shard);
        Ok(())
    }
}
