//! Converts any checkpoint to RDRR, streaming: at most one shard and a few rows of one tensor are
//! in memory at a time.
//!
//! It stores what the model's graph needs, by name and shape. A tensor that is missing, misshapen
//! or not understood stops the conversion before anything is written; so does a tokenizer that
//! cannot be used. A chat template comes along as it is. A weight that is not finite stops it when it is read. The same input gives the
//! same bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rayon::prelude::*;
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::layout::{EXPERT_ALIGN, Item, Plan, place};
use super::mixture::{Kind, Mixture, Quantization};
use super::recipe::Resolved;
use super::sink::ShardSink;
use super::{LoadError, Result, describe, further, tied, tokenizer};
use crate::families::{self, Described};
use crate::graph::{Graph, Moe, Weight, WeightRole};
use crate::quant::{dequantize, first_not_finite, quantize};
use crate::template;
use doppler_store::manifest::{
    HashAlgorithm, ManifestBody, Role, Shard, ShardHash, Span, TensorEntry, Tensors, TokenizerEntry,
};
use doppler_store::verified::OBJECT_BYTES_MAX;
use doppler_store::{DType, Manifest, ShardId};

/// RDRR's shard size, in bytes.
pub const SHARD_BYTES_DEFAULT: u64 = OBJECT_BYTES_MAX;

/// Source bytes read at a time: enough rows to keep every core busy.
const CHUNK_BYTES: u64 = 4 << 20;

/// The progress of a conversion.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The tensor being stored.
    pub tensor: &'a str,
    /// Source bytes done, and in total.
    pub done: u64,
    pub total: u64,
}

/// Converts a checkpoint into a manifest and shards of at most `shard_bytes` (a multiple of 4 KiB
/// up to 64 MiB), and gives them to `sink`.
///
/// # Errors
/// One line that names the file or tensor. If the config, the architecture, a header, a shape or
/// the tokenizer is at fault, nothing has been given to the sink.
pub fn convert(
    checkpoint: &dyn Checkpoint,
    quantization: Quantization,
    shard_bytes: u64,
    sink: &mut dyn ShardSink,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Manifest> {
    check_shard_bytes(shard_bytes)?;
    let model = families::read(checkpoint.config())?;
    let graph = &model.graph;
    let sources = Sources::new(checkpoint, graph)?;
    tied::refuse_another_head(checkpoint, graph)?;
    let stored_as = |weight: &Weight| {
        let source = sources.of(&weight.tensor)?;
        Ok((source.shape(), source.dtype))
    };
    let plan = plan(&stored_as, graph, quantization, shard_bytes)?;
    let tokenizer = tokenizer::read(checkpoint)?;
    let (eos, config) = (checkpoint.eos_token_ids()?, checkpoint.config());
    let kept = checkpoint.quantization().filter(|_| quantization == Quantization::Keep);
    let model_id = match &kept {
        // The file's own name says what it is.
        Some(_) => plain_name(&checkpoint.name()),
        None => format!("{}-{quantization}", plain_name(&checkpoint.name())),
    };
    let mut body = body(eos, config, &model, quantization, model_id)?;
    body.quantization = kept.unwrap_or(body.quantization);
    body.chat = checkpoint.chat_templates()?;
    if let Some(Err(problem)) = body.chat.as_ref().map(template::check) {
        tracing::warn!("{problem}: the model can be run, but not chatted with");
    }
    // The plan must be a valid manifest before it is carried out.
    Manifest::new(with_tensors(body.clone(), &plan, planned_shards(&plan), None)?)?;

    let shards = store(&sources, &plan, sink, progress)?;
    let tokenizer = match tokenizer {
        None => None,
        Some(bytes) => {
            let (size, id) = (Some(bytes.len() as u64), Some(ShardId::of(&bytes)));
            let file = tokenizer::FILE;
            sink.file(file, bytes)?;
            Some(TokenizerEntry { file: file.into(), size, id })
        }
    };
    let manifest = Manifest::new(with_tensors(body, &plan, shards, tokenizer)?)?;
    sink.finish(manifest.to_json_bytes())?;
    Ok(manifest)
}

/// Refuses a shard size that is not a whole number of pages, or larger than an object may be.
pub(super) fn check_shard_bytes(shard_bytes: u64) -> Result<()> {
    let page = shard_bytes.is_multiple_of(EXPERT_ALIGN);
    if !page || !(EXPERT_ALIGN..=OBJECT_BYTES_MAX).contains(&shard_bytes) {
        return Err(LoadError::ShardBytes(shard_bytes));
    }
    Ok(())
}

/// A checkpoint's name as part of a model's id.
fn plain_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    name.chars().take(128).map(plain).collect()
}

/// How each weight of a graph is made from the checkpoint's tensors, by its name.
struct Sources<'a> {
    checkpoint: &'a dyn Checkpoint,
    by_weight: HashMap<String, Resolved>,
}

impl<'a> Sources<'a> {
    /// # Errors
    /// If no part of the graph reads a tensor (a tensor that nothing mentions is reported first),
    /// or a weight's tensors are missing or do not fit.
    fn new(checkpoint: &'a dyn Checkpoint, graph: &Graph) -> Result<Self> {
        let experts = |moe: &Moe| -> Vec<Weight> {
            (0..moe.experts.len()).flat_map(|number| moe.weights(number)).collect()
        };
        let weights = graph.weights.iter().cloned();
        let weights: Vec<Weight> = weights.chain(graph.moe.iter().flat_map(experts)).collect();
        let sources: Vec<_> = weights.iter().map(|weight| checkpoint.source(weight)).collect();
        let mut known = HashSet::new();
        for (weight, source) in weights.iter().zip(&sources) {
            source.names(&weight.tensor, &mut |name| {
                known.insert(name);
            });
        }
        refuse_strangers(checkpoint, graph, &known)?;
        let mut by_weight = HashMap::new();
        for weight in &weights {
            by_weight.insert(weight.tensor.clone(), Resolved::new(checkpoint, weight)?);
        }
        let mut used = HashSet::new();
        for source in by_weight.values() {
            source.names(&mut |name| {
                used.insert(name);
            });
        }
        refuse_strangers(checkpoint, graph, &used)?;
        Ok(Self { checkpoint, by_weight })
    }

    fn of(&self, weight: &str) -> Result<&Resolved> {
        self.by_weight.get(weight).ok_or_else(|| super::missing(self.checkpoint, weight))
    }
}

/// Refuses tensors that are not `known`. Leaving one out would change the model's output.
fn refuse_strangers(
    checkpoint: &dyn Checkpoint,
    graph: &Graph,
    known: &HashSet<&str>,
) -> Result<()> {
    let tied = graph.tied();
    let harmless = |name: &str| {
        // The first is computed from the config, the second a copy of the tied embedding. AutoGPTQ
        // gives every module a bias.
        name.ends_with(".rotary_emb.inv_freq")
            || tied && name == tied::HEAD
            || name.ends_with(".bias") && is_zero(checkpoint, name)
            || graph.embeds() && beside_states(name)
            || further::is_further(checkpoint.config(), name)
    };
    match checkpoint.names().find(|name| !known.contains(name) && !harmless(name)) {
        None => Ok(()),
        Some(name) => {
            let family = families::name(checkpoint.config())?;
            let problem = format!("not part of a {family} model: not understood");
            Err(LoadError::Tensor { tensor: name.to_owned(), problem })
        }
    }
}

/// Whether a tensor of an embedding model does not lead to its states: heads for other tasks, and the
/// numbers of positions.
fn beside_states(name: &str) -> bool {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    let heads = ["pooler.", "cls.", "classifier."];
    heads.iter().any(|head| name.starts_with(head))
        || [tied::HEAD, "embeddings.position_ids"].contains(&name)
}

/// Whether a vector is nothing but zeros.
fn is_zero(checkpoint: &dyn Checkpoint, name: &str) -> bool {
    let Some(stored) = checkpoint.find(name) else { return false };
    let (rows, cols) = stored.rows_cols();
    let Some(dtype) = stored.dtype().filter(|_| rows == 1 && cols <= 1 << 20) else { return false };
    let (mut bytes, mut values) =
        (vec![0; dtype.row_bytes(cols as usize)], vec![0.0; cols as usize]);
    if checkpoint.read(name, 0, &mut bytes).is_err() {
        return false;
    }
    dequantize(dtype, &bytes, cols as usize, &mut values);
    values.iter().all(|value| *value == 0.0)
}

/// A tensor's shape and type before quantization.
pub(super) type Original<'a> = dyn Fn(&Weight) -> Result<(Vec<u64>, DType)> + 'a;

/// Assigns every tensor that the graph reads its place. `source` gives its shape and type before
/// quantization.
pub(super) fn plan(
    source: &Original<'_>,
    graph: &Graph,
    quantization: Quantization,
    shard_bytes: u64,
) -> Result<Plan> {
    let experts = graph.moe.first().map_or(0, |moe| moe.experts.len());
    let mixture = Mixture { quantization, layers: graph.layers, experts };
    let tied = graph.tied();
    let item = |weight: &Weight, role: Role, group: String| {
        let (shape, from) = source(weight)?;
        let name = weight.tensor.clone();
        let kind = match (kind(weight.role, tied), &role) {
            (Kind::FeedForwardDown, Role::Expert) => Kind::ExpertDown,
            (Kind::Matrix, Role::Expert) => Kind::Expert,
            (kind, _) => kind,
        };
        let dtype = mixture.dtype(kind, weight.layer, from, weight.cols as u64);
        // In these two formats makers publish originals.
        let original = matches!(from, DType::Mxfp4 | DType::Fp8);
        if from.is_quantised() && !original && dtype != from {
            let problem = format!(
                "it is {from} already, and making {dtype} of it would lose more; \
                 convert the original checkpoint"
            );
            return Err(LoadError::Tensor { tensor: name, problem });
        }
        // Bounded by the config's limits on dimensions: 2^20 * 2^20 * 4.
        let size = weight.rows as u64 * dtype.row_bytes(weight.cols) as u64;
        Ok(Item { name, shape, dtype, size, role, group })
    };
    let mut trunk = Vec::with_capacity(graph.weights.len());
    for weight in &graph.weights {
        let group = match (weight.layer, weight.role) {
            (Some(layer), _) => format!("layer.{layer}"),
            (None, WeightRole::Embedding) => "embed".to_owned(),
            (None, _) => "head".to_owned(),
        };
        trunk.push(item(weight, role(weight.role), group)?);
    }
    let mut experts = Vec::new();
    for moe in &graph.moe {
        for number in 0..moe.experts.len() {
            let group = format!("layer.{}.expert.{number}", moe.layer);
            let parts = moe.weights(number);
            let parts = parts.iter().map(|weight| item(weight, Role::Expert, group.clone()));
            experts.push(parts.collect::<Result<_>>()?);
        }
    }
    Ok(place(trunk, experts, shard_bytes))
}

/// A trunk tensor's role in RDRR's terms.
const fn role(role: WeightRole) -> Role {
    match role {
        WeightRole::Embedding => Role::Embedding,
        WeightRole::Head => Role::LmHead,
        WeightRole::Norm => Role::Norm,
        WeightRole::Router => Role::Router,
        WeightRole::Query
        | WeightRole::Key
        | WeightRole::Value
        | WeightRole::AttentionOutput
        | WeightRole::Projection
        | WeightRole::Gate
        | WeightRole::Up
        | WeightRole::Down => Role::Matmul,
        WeightRole::Bias | WeightRole::Other => Role::Other,
    }
}

/// What the stored type depends on. `tied` means that the embedding is also the output matrix.
pub(super) const fn kind(role: WeightRole, tied: bool) -> Kind {
    match role {
        WeightRole::Embedding if tied => Kind::Output,
        WeightRole::Embedding => Kind::Embedding,
        WeightRole::Head => Kind::Output,
        WeightRole::Key => Kind::AttentionKey,
        WeightRole::Value => Kind::AttentionValue,
        WeightRole::AttentionOutput => Kind::AttentionOutput,
        WeightRole::Down => Kind::FeedForwardDown,
        WeightRole::Query | WeightRole::Gate | WeightRole::Up | WeightRole::Projection => {
            Kind::Matrix
        }
        WeightRole::Norm | WeightRole::Bias | WeightRole::Router | WeightRole::Other => Kind::Kept,
    }
}

/// The manifest without shards, tensors and tokenizer. `config` is the model's own.
pub(super) fn body(
    eos_token_ids: Vec<u32>,
    config: &Value,
    model: &Described,
    quantization: Quantization,
    model_id: String,
) -> Result<ManifestBody> {
    Ok(ManifestBody {
        version: 1,
        model_id,
        model_type: families::name(config)?.to_owned(),
        quantization: quantization.rdrr_name().to_owned(),
        architecture: describe::architecture(&model.graph, config),
        moe: describe::moe_config(&model.graph),
        inference: describe::inference(model),
        config: config.clone(),
        shards: Vec::new(),
        tensors: Tensors::default(),
        total_size: 0,
        eos_token_ids,
        tokenizer: None,
        chat: None,
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

/// The shards before they have contents: every hash is zero.
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

/// Carries out the plan: reads, quantizes, and fills shard after shard. What an interrupted run has
/// finished is not made again.
fn store(
    sources: &Sources<'_>,
    plan: &Plan,
    sink: &mut dyn ShardSink,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Shard>> {
    let mut tensors = Vec::with_capacity(plan.tensors.len());
    for (name, tensor) in &plan.tensors {
        tensors.push((name, tensor, sources.of(name)?));
    }
    sink.begin(plan.shards.iter().sum())?;
    let size = |source: &Resolved| source.rows * source.row_bytes() as u64;
    let total = tensors.iter().map(|(_, _, source)| size(source)).sum();
    let mut uses = Uses::new(sources.checkpoint, tensors.iter().map(|(_, _, source)| *source));
    let mut done = 0;
    let mut writer = Writer::new(&plan.shards, sink);
    for (name, tensor, source) in tensors {
        progress(Progress { tensor: name, done, total });
        let last = tensor.spans.last().map_or(0, |span| span.shard as usize);
        if last >= writer.shards.len() {
            let mut place = SpansLeft { spans: &tensor.spans, filled: 0 };
            store_tensor(sources.checkpoint, name, tensor, source, &mut |bytes| {
                writer.append(&mut place, bytes)
            })?;
        }
        uses.done(source, last);
        uses.release(writer.shards.len());
        done += size(source);
    }
    writer.finish()?;
    uses.release(writer.shards.len());
    progress(Progress { tensor: "", done, total });
    Ok(writer.shards)
}

/// The stored tensors that weights are still to be made of. A tensor is released when the last shard
/// that has anything of it has been given to the sink.
struct Uses<'a> {
    checkpoint: &'a dyn Checkpoint,
    /// Weights that are still to be made of it, and the last shard with anything of it.
    left: HashMap<&'a str, (usize, usize)>,
    /// Tensors of which everything is made, by that shard.
    made: BTreeMap<usize, Vec<&'a str>>,
}

impl<'a> Uses<'a> {
    /// `sources` are in the order of their weights.
    fn new(checkpoint: &'a dyn Checkpoint, sources: impl Iterator<Item = &'a Resolved>) -> Self {
        let mut left: HashMap<&str, (usize, usize)> = HashMap::new();
        let mut order = Vec::new();
        for source in sources {
            for name in names(source) {
                let entry = left.entry(name).or_insert_with(|| {
                    order.push(name);
                    (0, 0)
                });
                entry.0 += 1;
            }
        }
        checkpoint.expect(&order);
        Self { checkpoint, left, made: BTreeMap::new() }
    }

    /// A weight is made, and its last bytes are in this shard.
    fn done(&mut self, source: &'a Resolved, shard: usize) {
        for name in names(source) {
            let Some((left, last)) = self.left.get_mut(name) else { continue };
            *left -= 1;
            *last = shard.max(*last);
            if *left == 0 {
                self.made.entry(*last).or_default().push(name);
            }
        }
    }

    /// So many shards have been given to the sink.
    fn release(&mut self, shards: usize) {
        let later = self.made.split_off(&shards);
        for name in std::mem::replace(&mut self.made, later).into_values().flatten() {
            self.checkpoint.release(name);
        }
    }
}

/// The stored tensors that a weight is made of, each once.
fn names(source: &Resolved) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    source.names(&mut |name| {
        names.insert(name);
    });
    names
}

/// Passes a tensor's stored bytes to `out`, some rows at a time.
fn store_tensor(
    checkpoint: &dyn Checkpoint,
    name: &str,
    tensor: &TensorEntry,
    source: &Resolved,
    out: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    store_rows(checkpoint, (name, tensor.dtype), source, out)
}

/// Passes the rows of a source to `out` as this type, some at a time.
pub(super) fn store_rows(
    checkpoint: &dyn Checkpoint,
    (name, dtype): (&str, DType),
    source: &Resolved,
    out: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = (source.rows, source.cols);
    let row_in = source.row_bytes() as u64;
    let row_out = dtype.row_bytes(cols as usize) as u64;
    let step = (CHUNK_BYTES / row_in.max(row_out)).clamp(1, rows);
    let mut read = vec![0; (step * row_in) as usize];
    let mut stored = vec![0; (step * row_out) as usize];
    let mut first = 0;
    while first < rows {
        let count = step.min(rows - first);
        let read = &mut read[..(count * row_in) as usize];
        source.read(checkpoint, first, read)?;
        let fail = |(row, source)| LoadError::Quantize {
            tensor: name.to_owned(),
            row: first + row as u64,
            source,
        };
        if source.dtype == dtype {
            if let Some(found) = first_not_finite(dtype, cols as usize, read) {
                return Err(fail(found));
            }
            out(read)?;
        } else {
            let stored = &mut stored[..(count * row_out) as usize];
            let types = (source.dtype, dtype);
            requantize(types, cols as usize, read, stored).map_err(fail)?;
            out(stored)?;
        }
        first += count;
    }
    Ok(())
}

/// Converts whole rows from one type to another, in parallel.
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

/// The spans of a tensor that are still to be filled.
pub(super) struct SpansLeft<'a> {
    pub spans: &'a [Span],
    /// Bytes filled of the first of `spans`.
    pub filled: u64,
}

/// Fills shards in order and passes each to the sink with its hash.
pub(super) struct Writer<'a> {
    sizes: &'a [u64],
    pub shards: Vec<Shard>,
    /// The shard being filled.
    buffer: Vec<u8>,
    sink: &'a mut dyn ShardSink,
}

impl<'a> Writer<'a> {
    /// Goes on behind what the sink has already.
    pub fn new(sizes: &'a [u64], sink: &'a mut dyn ShardSink) -> Self {
        let mut shards = Vec::new();
        for ((id, size), planned) in sink.finished().into_iter().zip(sizes) {
            if size != *planned {
                break;
            }
            let hash = ShardHash { algorithm: HashAlgorithm::Blake3, bytes: *id.as_bytes() };
            shards.push(next_shard(&shards, size, hash));
        }
        Self { sizes, shards, buffer: Vec::new(), sink }
    }

    pub fn append(&mut self, place: &mut SpansLeft<'_>, mut bytes: &[u8]) -> Result<()> {
        while let Some((span, rest)) = place.spans.split_first().filter(|_| !bytes.is_empty()) {
            if self.shards.len() < span.shard as usize {
                self.close()?;
            }
            let left = usize::try_from(span.size - place.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            // Otherwise an interrupted run has finished this shard.
            if self.shards.len() == span.shard as usize {
                // Pads with zeros between the last tensor and this one.
                self.buffer.resize((span.offset + place.filled) as usize, 0);
                self.buffer.extend_from_slice(now);
            }
            place.filled += now.len() as u64;
            if place.filled == span.size {
                *place = SpansLeft { spans: rest, filled: 0 };
            }
            bytes = later;
        }
        Ok(())
    }

    /// Passes on the last shard.
    pub fn finish(&mut self) -> Result<()> {
        if self.shards.len() < self.sizes.len() { self.close() } else { Ok(()) }
    }

    /// Passes on the shard being filled.
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
