//! A model's step for a browser's WebGPU: what to allocate, which bytes of which shards go where,
//! and the dispatches, as plain data that a page executes without knowing any op.
//!
//! Made by the same lowering as a plan for a local device (lower.rs, decode/), for an adapter with
//! WebGPU's guaranteed limits: no cooperative matrices, subgroups only if the page asks for them,
//! bindings of `binding_bytes_max`. Kernels are identified by the hash of their text.
//!
//! Refuses what a local session would refuse: see [`ProgramError`]. Reads no weights.

use std::collections::BTreeMap;

use serde::Serialize;

use super::buffers::elements;
use super::decode;
use super::dispatch::{Grid, Rows};
use super::experts::{Class, SlotShape};
use super::kernels::Kernel;
use super::lower::{Lower, Place, Recipe};
use super::pipelines::Reduction;
use super::weights::{WeightShape, cut, join_shapes, vectors};
use crate::backend::{BackendError, Capacity, KvFormat};
use crate::error::SessionError;
use crate::graph::{MatrixSpec, MoeId, Op, RopeId, WeightId};
use crate::model::{Model, TrunkTensor};
use crate::quant::planes::{self, Planes};
use crate::reader::ShardRange;
use crate::slots::{SlotBudget, SlotPlan};
use doppler_store::ShardId;

/// WebGPU's default `maxStorageBufferBindingSize`.
pub const BINDING_BYTES_DEFAULT: u64 = 128 << 20;
/// The least that a page may ask for.
pub const BINDING_BYTES_MIN: u64 = 1 << 20;
/// The most tokens of a step. Longer prompts are split into steps.
pub const BATCH_MAX: usize = 64;
/// The default number of positions in the cache.
pub const CONTEXT_DEFAULT: usize = 1024;
/// The most positions that a page may ask for. Their rope tables are made at the start.
pub const CONTEXT_MAX: usize = 32_768;

/// What a page may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgramOptions {
    pub reduction: Reduction,
    /// Whether the adapter's subgroups may be used. They must have at least 32 invocations.
    pub subgroups: bool,
    pub kv: KvFormat,
    /// The most bytes of a storage binding.
    pub binding_bytes_max: u64,
    /// Positions of the cache. `None` means the model's own maximum, but at most
    /// [`CONTEXT_DEFAULT`].
    pub context: Option<usize>,
    /// Expert slots. `None` means half the number of experts, if that is enough for a token.
    pub slots: Option<usize>,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        Self {
            reduction: Reduction::Group,
            subgroups: false,
            kv: KvFormat::default(),
            binding_bytes_max: BINDING_BYTES_DEFAULT,
            context: None,
            slots: None,
        }
    }
}

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("{what} is {value}: it must be {least} to {most}")]
    Option { what: &'static str, value: u64, least: u64, most: u64 },
    #[error("{what} takes {bytes} bytes, but a binding holds {most}")]
    Binding { what: &'static str, bytes: u64, most: u64 },
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl From<BackendError> for ProgramError {
    fn from(error: BackendError) -> Self {
        Self::Session(error.into())
    }
}

/// A model's step as data. Buffers, kernels, dispatches and shards are identified by their index.
#[derive(Debug, Default, Serialize)]
pub struct Program {
    pub vocab: usize,
    pub context: usize,
    /// The most tokens of a step.
    pub batch: usize,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    pub tokenizer: Option<Object>,
    pub shards: Vec<Object>,
    /// How the weights' formats are repacked, by name.
    pub formats: BTreeMap<&'static str, &'static Planes>,
    /// Bytes of each buffer.
    pub buffers: Vec<u64>,
    /// The buffer of the token ids, and the buffer of one row of logits.
    pub tokens: usize,
    pub logits: usize,
    /// The table of cache blocks. Its words from the second on are 0, 1, 2, ...: the blocks of the
    /// only sequence, in order.
    pub blocks: usize,
    pub kernels: Vec<KernelInfo>,
    pub ropes: Vec<RopeTable>,
    pub weights: Vec<WeightInfo>,
    pub classes: Vec<ClassInfo>,
    pub moe: Vec<MoeInfo>,
    pub dispatches: Vec<DispatchInfo>,
    /// A step of any number of tokens.
    pub steps: Vec<Stretch>,
    /// A step of one token as one submission, unless the device cannot look up its experts.
    pub token: Option<TokenInfo>,
}

/// A content-addressed object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Object {
    pub id: ShardId,
    pub size: u64,
}

/// One kernel. `write` says for each storage buffer, in binding order, whether it is written.
#[derive(Debug, Serialize)]
pub struct KernelInfo {
    pub name: &'static str,
    /// BLAKE3 of its text.
    pub hash: String,
    /// Whether it uses subgroups, so that `enable subgroups;` goes before the text.
    pub subgroups: bool,
    pub write: Vec<bool>,
}

/// (cos, sin) of `position * inv_freq`, times the factor, by position and frequency.
#[derive(Debug, Serialize)]
pub struct RopeTable {
    pub buffer: usize,
    pub inv_freq: Vec<f32>,
    pub factor: f32,
}

/// Bytes `start..end` of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run(pub usize, pub u64, pub u64);

/// A matrix as it is stored, in one of the program's formats: whole rows of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Stored {
    pub format: &'static str,
    pub rows: usize,
    pub cols: usize,
}

/// A weight of the trunk. Its stored bytes are `runs`, one after another.
#[derive(Debug, Serialize)]
pub struct WeightInfo {
    pub tensor: String,
    #[serde(flatten)]
    pub stored: Stored,
    pub runs: Vec<Run>,
    /// Where it goes as f32 elements, if it is read as a vector: (buffer, byte).
    pub vectors: Vec<(usize, usize)>,
    /// Otherwise where its rows go as planes: (buffer, byte, first row, rows).
    pub pieces: Vec<(usize, usize, usize, usize)>,
}

/// Slots of the same size.
#[derive(Debug, Serialize)]
pub struct ClassInfo {
    pub count: u32,
    /// Device bytes of a slot.
    pub stride: usize,
    /// Stored bytes of an expert.
    pub bytes: usize,
    /// Gate, up and down.
    pub parts: Vec<PartInfo>,
    pub slots_per_chunk: u32,
    /// By chunk.
    pub buffers: Vec<usize>,
    /// The index of the first of them in the rows of the layers' tables.
    pub first_chunk: usize,
}

/// A matrix of an expert: where it begins in the stored bytes, and where its planes begin in the
/// slot.
#[derive(Debug, Serialize)]
pub struct PartInfo {
    #[serde(flatten)]
    pub stored: Stored,
    pub from: usize,
    pub to: usize,
}

/// A mixture-of-experts layer.
#[derive(Debug, Serialize)]
pub struct MoeInfo {
    pub layer: usize,
    pub class: u16,
    pub top_k: usize,
    /// The chosen experts' buffer, `[tokens, top_k]`.
    pub ids: usize,
    /// The slot table's buffer, `[chunks, experts]`.
    pub table: usize,
    /// By expert.
    pub experts: Vec<Vec<Run>>,
}

/// One dispatch.
#[derive(Debug, Serialize)]
pub struct DispatchInfo {
    pub kernel: usize,
    /// The words of its parameters.
    pub params: Vec<u32>,
    pub storage: Vec<usize>,
    pub rows: Rows,
    pub grid: Grid,
    /// The fewest and the most rows for which it is used.
    pub when: (u32, u32),
}

/// A stretch of a step between two decisions of the host: dispatches in order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stretch {
    Run(Vec<usize>),
    /// A layer's experts: in each wave the dispatches of the chunks that it fills, then the sum.
    Experts {
        moe: usize,
        /// By chunk of the layer's class.
        waves: Vec<Vec<usize>>,
        sum: Vec<usize>,
    },
}

impl Program {
    /// # Errors
    /// If an option is out of bounds, a buffer does not fit a binding, or a session would refuse
    /// the model.
    pub fn new(model: &Model, options: &ProgramOptions) -> Result<Self, ProgramError> {
        let most = options.binding_bytes_max;
        if model.graph.embeds() {
            let what = "embeddings in a page".to_owned();
            return Err(BackendError::Unsupported(what).into());
        }
        bounded("binding", most, BINDING_BYTES_MIN, u64::from(u32::MAX))?;
        // A page does not run a sequence again in another form.
        let longest = model.graph.context_max.min(CONTEXT_MAX);
        let longest = model.graph.stretches_from().unwrap_or(longest).min(longest);
        let context = options.context.unwrap_or(CONTEXT_DEFAULT.min(longest));
        bounded("context", context as u64, 1, longest as u64)?;
        let batch = BATCH_MAX.min(context);
        let capacity = Capacity { batch, context, kv: options.kv };
        let plan = slots(model, options)?;
        let mut classes: Vec<Class> = Vec::with_capacity(plan.classes.len());
        let mut chunks: Vec<SlotShape> = Vec::new();
        for class in &plan.classes {
            let class = Class::new(class, chunks.len(), most)?;
            chunks.extend(class.chunks().map(|_| class.shape));
            classes.push(class);
        }
        let mut weights = shapes(model, most)?;
        let f16_cache = options.kv == KvFormat::F16;
        for group in decode::together(&model.graph, options.reduction, f16_cache) {
            join_shapes(&mut weights, &group, most);
        }
        let mut lower = Lower {
            graph: &model.graph,
            weights: &weights,
            chunks: &chunks,
            kv: options.kv,
            batch,
            reduction: options.reduction,
            cooperative: None,
            halved: None,
        };
        let mut make = Make {
            capacity,
            binding_bytes_max: most,
            model,
            weights: &weights,
            classes: &classes,
            chunks: chunks.len(),
            places: BTreeMap::new(),
            kernel_of: BTreeMap::new(),
            shard_of: BTreeMap::new(),
            made: Self {
                vocab: model.graph.vocab,
                context,
                batch,
                eos: model.manifest.eos_token_ids.clone(),
                tokenizer: tokenizer(model),
                ..Self::default()
            },
        };
        make.steps(&mut lower, &plan)?;
        make.token(lower, &plan, options)?;
        make.made.tokens = make.buffer(Place::Tokens)?;
        make.made.logits = make.buffer(Place::Logits)?;
        make.made.blocks = make.buffer(Place::BlockTable)?;
        make.ropes()?;
        make.trunk()?;
        make.slots()?;
        make.moe(&plan)?;
        Ok(make.made)
    }
}

fn tokenizer(model: &Model) -> Option<Object> {
    let tokenizer = model.manifest.tokenizer.as_ref()?;
    Some(Object { id: tokenizer.id?, size: tokenizer.size? })
}

fn bounded(what: &'static str, value: u64, least: u64, most: u64) -> Result<(), ProgramError> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(ProgramError::Option { what, value, least, most })
    }
}

/// The name of a buffer that is not split, for people.
const fn words(place: Place) -> &'static str {
    match place {
        Place::Keys(_) | Place::Values(_) => "the attention cache of a layer",
        Place::BlockTable => "the table of cache blocks",
        Place::RopeTable(_) => "a rope table",
        Place::Logits => "the logits of a token",
        Place::Table(_) => "a table of expert slots",
        Place::Vector(_) | Place::RowRange(..) | Place::Slots(_) => "a weight",
        _ => "what a step computes",
    }
}

/// The slots asked for, or half the number of experts if that is enough for a token.
fn slots(model: &Model, options: &ProgramOptions) -> Result<SlotPlan, SessionError> {
    let demand: usize = model.graph.moe.iter().map(|moe| moe.top_k).sum();
    let slots = options.slots.unwrap_or_else(|| demand.max(model.experts().div_ceil(2)));
    let bytes = |layout: &_| SlotShape::of(layout).stride as u64;
    let budget = SlotBudget::Experts(slots);
    SlotPlan::over(model, bytes, options.binding_bytes_max, 0, budget)
}

fn shapes(model: &Model, most: u64) -> Result<Vec<WeightShape>, BackendError> {
    let vectors = vectors(&model.graph);
    let shape = |(tensor, vector): (&TrunkTensor, bool)| {
        if vector {
            return Ok(WeightShape::Vector);
        }
        Ok(WeightShape::Matrix(cut("a weight", &tensor.spec, most)?))
    };
    model.trunk.iter().zip(vectors).map(shape).collect()
}

/// A program being made.
struct Make<'a> {
    model: &'a Model,
    capacity: Capacity,
    binding_bytes_max: u64,
    weights: &'a [WeightShape],
    classes: &'a [Class],
    chunks: usize,
    places: BTreeMap<Place, usize>,
    kernel_of: BTreeMap<String, usize>,
    shard_of: BTreeMap<ShardId, usize>,
    made: Program,
}

impl Make<'_> {
    /// Makes the dispatches, op by op, cut at each `Experts` op as in a session.
    fn steps(&mut self, lower: &mut Lower<'_>, plan: &SlotPlan) -> Result<(), ProgramError> {
        let mut run = Vec::new();
        for op in &self.model.graph.ops {
            let recipes = lower.op(op)?;
            let dispatches = self.dispatches(&recipes)?;
            let Op::Experts { moe, x, .. } = *op else {
                run.extend(dispatches);
                continue;
            };
            self.made.steps.push(Stretch::Run(std::mem::take(&mut run)));
            let class = &self.classes[usize::from(plan.class_of[usize::from(moe.0)])];
            let all = lower.waves(moe, x)?;
            let mine = class.first_chunk..class.first_chunk + class.chunks().count();
            let waves = all[mine].iter().map(|wave| match wave {
                Some(recipes) => self.dispatches(recipes),
                None => {
                    let layer = self.model.graph.moe_spec(moe).layer;
                    let what = format!("layer {layer} in slots of another shape");
                    Err(BackendError::Unsupported(what).into())
                }
            });
            let waves = waves.collect::<Result<_, ProgramError>>()?;
            let moe = usize::from(moe.0);
            self.made.steps.push(Stretch::Experts { moe, waves, sum: dispatches });
        }
        self.made.steps.push(Stretch::Run(run));
        Ok(())
    }

    fn dispatches(&mut self, recipes: &[Recipe]) -> Result<Vec<usize>, ProgramError> {
        recipes.iter().map(|recipe| self.dispatch(recipe)).collect()
    }

    fn dispatch(&mut self, recipe: &Recipe) -> Result<usize, ProgramError> {
        let storage = recipe.storage.iter().map(|place| self.buffer(*place));
        let storage = storage.collect::<Result<_, _>>()?;
        let info = DispatchInfo {
            kernel: self.kernel(&recipe.kernel)?,
            params: bytemuck::pod_collect_to_vec(&recipe.params),
            storage,
            rows: recipe.rows,
            grid: recipe.grid,
            when: (*recipe.when.start(), *recipe.when.end()),
        };
        self.made.dispatches.push(info);
        Ok(self.made.dispatches.len() - 1)
    }

    fn kernel(&mut self, name: &str) -> Result<usize, ProgramError> {
        if let Some(index) = self.kernel_of.get(name) {
            return Ok(*index);
        }
        let kernel = Kernel::find(name).filter(|kernel| kernel.in_browsers());
        let kernel = kernel.ok_or_else(|| {
            BackendError::Unsupported(format!("there is no portable kernel {name}"))
        })?;
        let index = self.made.kernels.len();
        self.made.kernels.push(KernelInfo {
            name: kernel.name,
            hash: kernel.hash().to_hex().to_string(),
            subgroups: kernel.subgroups,
            write: kernel.storage.iter().map(|storage| storage.write).collect(),
        });
        self.kernel_of.insert(name.to_owned(), index);
        Ok(index)
    }

    /// The buffer's index. Its size is set at the first call.
    fn buffer(&mut self, place: Place) -> Result<usize, ProgramError> {
        let place = self.home(place);
        if let Some(index) = self.places.get(&place) {
            return Ok(*index);
        }
        let bytes = self.bytes(place).unwrap_or(u64::MAX);
        let most = self.binding_bytes_max;
        if bytes > most {
            return Err(ProgramError::Binding { what: words(place), bytes, most });
        }
        let index = self.made.buffers.len();
        self.made.buffers.push(bytes.max(16).next_multiple_of(16));
        self.places.insert(place, index);
        Ok(index)
    }

    /// The place that holds a row range, if it is shared with others.
    fn home(&self, place: Place) -> Place {
        let Place::RowRange(id, index) = place else { return place };
        match &self.weights[id.0 as usize] {
            WeightShape::Matrix(ranges) => {
                ranges.get(index).map_or(place, |range| range.place(id, index))
            }
            WeightShape::Vector | WeightShape::Missing => place,
        }
    }

    /// Bytes of a row range, or of all that share its buffer.
    fn row_range_bytes(&self, id: WeightId, index: usize) -> Option<u64> {
        let WeightShape::Matrix(ranges) = &self.weights[id.0 as usize] else { return None };
        let range = ranges.get(index)?;
        if range.home.is_none() {
            return Some(range.packed.bytes() as u64);
        }
        let matrices = self.weights.iter().filter_map(|weight| match weight {
            WeightShape::Matrix(ranges) => Some(ranges),
            WeightShape::Vector | WeightShape::Missing => None,
        });
        let together = matrices.flatten().filter(|other| other.home == range.home);
        together.map(|other| (other.at + other.packed.bytes()) as u64).max()
    }

    fn bytes(&self, place: Place) -> Option<u64> {
        let graph = &self.model.graph;
        let words = |id: WeightId| graph.weight_spec(id).cols as u64 * 4;
        match place {
            Place::Vector(id) => Some(words(id)),
            Place::Biases(ids) => Some(ids.map(words).iter().sum()),
            Place::RowRange(id, index) => self.row_range_bytes(id, index),
            Place::Slots(chunk) => self.classes.iter().find_map(|class| {
                let slots = class.chunks().nth(chunk.checked_sub(class.first_chunk)?)?;
                Some(u64::from(slots) * class.shape.stride as u64)
            }),
            Place::Table(moe) => Some((self.chunks * graph.moe_spec(moe).experts.len()) as u64 * 4),
            sized => {
                let sampled = token::choice_words(graph.vocab, sized);
                (sampled.or_else(|| elements(graph, self.capacity, sized))? as u64).checked_mul(4)
            }
        }
    }

    fn runs(&mut self, pieces: &[ShardRange]) -> Result<Vec<Run>, ProgramError> {
        let run = |piece: &ShardRange| {
            let range = piece.range;
            Ok(Run(self.shard(piece.shard)?, range.start(), range.end()))
        };
        pieces.iter().map(run).collect()
    }

    fn shard(&mut self, id: ShardId) -> Result<usize, ProgramError> {
        if let Some(index) = self.shard_of.get(&id) {
            return Ok(*index);
        }
        let shards = &self.model.manifest.shards;
        let shard = shards.iter().find(|shard| shard.id().is_ok_and(|of| of == id));
        let size = shard.map(|shard| shard.size).ok_or_else(|| {
            BackendError::Unsupported(format!("shard {id}, which the manifest does not have"))
        })?;
        let index = self.made.shards.len();
        self.made.shards.push(Object { id, size });
        self.shard_of.insert(id, index);
        Ok(index)
    }

    /// Describes a stored matrix by the name of its format, and adds the format to the program.
    fn stored(&mut self, spec: &MatrixSpec) -> Stored {
        let format = spec.dtype.file_name();
        self.made.formats.insert(format, planes::of(spec.dtype));
        Stored { format, rows: spec.rows, cols: spec.cols }
    }

    fn ropes(&mut self) -> Result<(), ProgramError> {
        for (i, rope) in (0..).zip(&self.model.graph.ropes) {
            let (inv_freq, factor) = (rope.inv_freq.clone(), rope.attention_factor);
            let buffer = self.buffer(Place::RopeTable(RopeId(i)))?;
            self.made.ropes.push(RopeTable { buffer, inv_freq, factor });
        }
        Ok(())
    }

    fn trunk(&mut self) -> Result<(), ProgramError> {
        let model = self.model;
        for (i, (tensor, weight)) in (0..).zip(model.trunk.iter().zip(&model.graph.weights)) {
            let dtype = tensor.spec.dtype;
            let mut info = WeightInfo {
                tensor: weight.tensor.clone(),
                stored: self.stored(&tensor.spec),
                runs: self.runs(&tensor.pieces)?,
                vectors: Vec::new(),
                pieces: Vec::new(),
            };
            match &self.weights[i as usize] {
                WeightShape::Matrix(pieces) => {
                    for (index, piece) in pieces.iter().enumerate() {
                        let buffer = self.buffer(Place::RowRange(WeightId(i), index))?;
                        info.pieces.push((buffer, piece.at, piece.row_start, piece.packed.rows));
                    }
                }
                WeightShape::Vector if dtype.is_quantised() => {
                    let what = format!("{} is a vector stored as {dtype}", weight.tensor);
                    return Err(BackendError::Unsupported(what).into());
                }
                WeightShape::Vector | WeightShape::Missing => {
                    info.vectors.push((self.buffer(Place::Vector(WeightId(i)))?, 0));
                    info.vectors.extend(self.joined(WeightId(i)));
                }
            }
            self.made.weights.push(info);
        }
        Ok(())
    }

    /// Where a vector is in buffers of several vectors.
    fn joined(&self, of: WeightId) -> Vec<(usize, usize)> {
        let joined = self.places.iter().filter_map(|(place, buffer)| {
            let Place::Biases(ids) = place else { return None };
            let before = ids.iter().position(|id| *id == of)?;
            let words = |id: &WeightId| self.model.graph.weight_spec(*id).cols;
            Some((*buffer, 4 * ids[..before].iter().map(words).sum::<usize>()))
        });
        joined.collect()
    }

    fn slots(&mut self) -> Result<(), ProgramError> {
        for class in self.classes {
            let (layout, shape) = (&class.layout, &class.shape);
            let mut part = |matrix: &MatrixSpec, to| PartInfo {
                stored: self.stored(matrix),
                from: matrix.offset,
                to,
            };
            let parts = vec![
                part(&layout.gate, shape.gate.1),
                part(&layout.up, shape.up.1),
                part(&layout.down, shape.down.1),
            ];
            let chunks = class.first_chunk..class.first_chunk + class.chunks().count();
            let buffers = chunks.map(|chunk| self.buffer(Place::Slots(chunk)));
            let info = ClassInfo {
                count: class.count,
                stride: shape.stride,
                bytes: layout.bytes,
                parts,
                slots_per_chunk: class.slots_per_chunk,
                buffers: buffers.collect::<Result<_, _>>()?,
                first_chunk: class.first_chunk,
            };
            self.made.classes.push(info);
        }
        Ok(())
    }

    fn moe(&mut self, plan: &SlotPlan) -> Result<(), ProgramError> {
        let model = self.model;
        for (i, (spec, layer)) in (0..).zip(model.graph.moe.iter().zip(&model.moe)) {
            let experts = layer.places.iter().map(|pieces| self.runs(pieces));
            let experts = experts.collect::<Result<_, _>>()?;
            let info = MoeInfo {
                layer: spec.layer,
                class: plan.class_of[usize::from(i)],
                top_k: spec.top_k,
                ids: self.buffer(Place::Ids(MoeId(i)))?,
                table: self.buffer(Place::Table(MoeId(i)))?,
                experts,
            };
            self.made.moe.push(info);
        }
        Ok(())
    }
}

mod token;

pub use token::TokenInfo;

#[cfg(test)]
#[path = "tests/program.rs"]
mod tests;
