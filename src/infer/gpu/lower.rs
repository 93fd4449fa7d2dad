//! Lowers a graph's ops to recipes: which kernel over which buffers, with which parameters, for how
//! many rows. Knows no device and no bytes. A plan binds recipes on a device (plan.rs), and a
//! program carries them to a browser (program.rs), so both run the same dispatches.
//!
//! Shapes are checked here, so a graph that the kernels do not support is refused before the first
//! step. Parameters are static; a grid grows with the step's rows.

use std::ops::RangeInclusive;

use super::batch::{ExpertProducts, LinearBatch};
use super::buffers::stride;
use super::cooperative::Cooperative;
use super::dispatch::{Grid, Rows};
use super::encoder::BY_TOKEN;
use super::experts::SlotShape;
use super::kernels::Kernel;
use super::params::{self, Params};
use super::pipelines::Reduction;
use super::weights::{RowRangeShape, WeightShape};
use crate::backend::{BackendError, KvFormat, Result};
use crate::graph::{
    Activation, Buf, Graph, Heads, KvId, MoeId, Op, RopeId, Scoring, StateId, WeightId,
};
use doppler_store::DType;

/// The widest head that the attention kernel supports.
pub(super) const HEAD_DIM_MAX: usize = 512;

/// A buffer that dispatches bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// The step's token ids.
    Tokens,
    Activation(Buf),
    Keys(KvId),
    Values(KvId),
    /// A layer's recurrent states, of each sequence the last few.
    Recurrent(StateId),
    /// Which of the sequences steps.
    RecurrentSlot,
    /// How many elements were clamped in the caches, and the blocks of the sequence that steps.
    BlockTable,
    /// A rope's table.
    RopeTable(RopeId),
    /// A MoE layer's chosen experts, and their routing weights.
    Ids(MoeId),
    RoutingWeights(MoeId),
    PairInner,
    PairOutputs,
    PairOrder,
    PairTiles,
    Halves,
    Scales,
    /// Sums over parts of the columns.
    Parts,
    Logits,
    /// Stands in for an absent bias.
    Empty,
    /// A weight as f32 elements.
    Vector(WeightId),
    /// A range of a matrix's rows, by its index.
    RowRange(WeightId, usize),
    /// A chunk of expert slots.
    Slots(usize),
    /// A MoE layer's table of slots.
    Table(MoeId),
    /// One token's row of an activation, packed for products (kernels/shared/pack.wgsl).
    Packed(Buf),
    /// One token's row of an activation that a kernel could not write in place.
    Moved(Buf),
    /// One token's queries, keys and values, one after the other.
    Qkv,
    /// The results of the splits of one token's attention.
    Partial,
    /// For each choice of one token, its expert's inner activations, packed.
    PackedInner,
    /// For each choice of one token: slot and routing weight; place in host memory and slot.
    Routed,
    Fetches,
    /// What is saved to restart a layer that halted.
    Aside,
    /// Whether a step halted, and its choices; the table of where experts are (decode/layout.rs).
    State,
    ExpertPlaces,
    /// A MoE layer's area in host memory.
    Spill(MoeId),
    /// Three vectors one after another.
    Biases([WeightId; 3]),
    /// The chosen token, and the buffers of sampling (sample.rs).
    Chosen,
    SampleMemory,
    SampleRanks,
    SampleBins,
    SampleParts,
}

/// One dispatch before it is bound to a device.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recipe {
    pub kernel: String,
    /// The kernel's `Params`.
    pub params: Vec<u8>,
    /// Group 1, in binding order.
    pub storage: Vec<Place>,
    pub rows: Rows,
    pub grid: Grid,
    /// The numbers of rows for which it is used.
    pub when: RangeInclusive<u32>,
}

/// Everything that recipes depend on.
pub(super) struct Lower<'a> {
    pub graph: &'a Graph,
    /// For each weight of the graph, its shape.
    pub weights: &'a [WeightShape],
    /// The shapes of the slots, by chunk.
    pub chunks: &'a [SlotShape],
    pub kv: KvFormat,
    /// The most tokens of a step.
    pub batch: usize,
    pub reduction: Reduction,
    pub cooperative: Option<Cooperative>,
    /// The buffer whose rows are in `Halves`, during consecutive linear products.
    pub halved: Option<Buf>,
}

/// A dispatch of `items` per row, of which a workgroup computes `per_workgroup`.
pub(super) fn recipe(
    kernel: &str,
    params: &impl Params,
    storage: &[Place],
    rows: Rows,
    (items, per_workgroup): (usize, u32),
) -> Recipe {
    recipe_grid(kernel, params, storage, rows, Grid::Items { items: items as u64, per_workgroup })
}

/// Panics on parameters of another kernel, which are a mistake of the caller.
pub(super) fn checked<P: Params>(kernel: &str, _: &P) {
    let takes = Kernel::find(kernel).map_or(P::NAME, |kernel| kernel.params);
    assert_eq!(takes, P::NAME, "the parameters of {kernel}");
}

pub(super) fn recipe_grid(
    kernel: &str,
    params: &impl Params,
    storage: &[Place],
    rows: Rows,
    grid: Grid,
) -> Recipe {
    checked(kernel, params);
    let params = bytemuck::bytes_of(params).to_vec();
    let storage = storage.to_vec();
    Recipe { kernel: kernel.to_owned(), params, storage, rows, grid, when: 1..=u32::MAX }
}

impl<'a> Lower<'a> {
    pub fn width(&self, buf: Buf) -> usize {
        self.graph.width(buf)
    }

    /// The suffix of reducing kernels, and the rows that one of their workgroups sums.
    pub const fn reduction(&self) -> (&'static str, u32) {
        (self.reduction.name(), self.reduction.rows_per_workgroup())
    }

    /// The row ranges of a weight that an op reads as a matrix.
    pub fn matrix(&self, id: WeightId) -> Result<&'a [RowRangeShape]> {
        let name = || &self.graph.weight_spec(id).tensor;
        match &self.weights[id.0 as usize] {
            WeightShape::Matrix(ranges) => Ok(ranges),
            WeightShape::Vector => {
                Err(refused(format!("{} is used both as a matrix and as a vector", name())))
            }
            WeightShape::Missing => Err(refused(format!("{} was never loaded", name()))),
        }
    }

    /// A weight that an op reads as a vector.
    pub fn vector(&self, id: WeightId) -> Result<Place> {
        match self.weights[id.0 as usize] {
            WeightShape::Vector => Ok(Place::Vector(id)),
            // `vectors` marks every weight that is read as a vector.
            WeightShape::Matrix(_) | WeightShape::Missing => {
                let name = &self.graph.weight_spec(id).tensor;
                Err(refused(format!("{name} was never loaded")))
            }
        }
    }

    // Long: one arm an op.
    pub fn op(&mut self, op: &Op) -> Result<Vec<Recipe>> {
        if !matches!(op, Op::Linear { .. }) {
            self.halved = None;
        }
        let one = match *op {
            Op::Embed { table, out, scale } => return self.embed(table, out, (BY_TOKEN, scale)),
            Op::EmbedMore { by, table, x } => return self.embed_more(by, table, x),
            Op::States { x } => self.states(x)?,
            Op::Linear { x, weight, bias, out } => {
                let result = Place::Activation(out);
                let result_stride = stride(self.width(out));
                expect(self.width(out) == self.graph.weight_spec(weight).rows, op)?;
                return self.linear(x, weight, bias, result, result_stride, Rows::Tokens);
            }
            Op::Logits { x, weight, bias, softcap } => {
                expect(self.graph.weight_spec(weight).rows == self.graph.vocab, op)?;
                let result = Place::Logits;
                let mut dispatches =
                    self.linear(x, weight, bias, result, self.graph.vocab, Rows::Logits)?;
                dispatches.extend(self.softcap(softcap)?);
                return Ok(dispatches);
            }
            Op::RmsNorm { x, weight, out, eps } => self.rms_norm(op, x, weight, out, eps)?,
            Op::LayerNorm { x, weight, bias, out, eps } => {
                self.layer_norm(op, x, (weight, bias), out, eps)?
            }
            Op::Activate { x, activation } => self.activate(x, activation)?,
            Op::Rope { x, heads, head_dim, rope } => {
                let pairs = self.graph.rope_spec(rope).inv_freq.len();
                expect(2 * pairs <= head_dim && heads * head_dim == self.width(x), op)?;
                let params = params::Rope {
                    heads: word(heads)?,
                    head_dim: word(head_dim)?,
                    pairs: word(pairs)?,
                    stride: word(stride(self.width(x)))?,
                };
                let storage = [Place::RopeTable(rope), Place::Activation(x)];
                recipe("rope", &params, &storage, Rows::Tokens, (heads * pairs, 64))
            }
            Op::KvWrite { kv, k, v } => {
                let shape = self.graph.kv_spec(kv);
                let width = shape.kv_heads * shape.head_dim;
                expect(self.width(k) == width && self.width(v) == width, op)?;
                expect(width.is_multiple_of(2), op)?;
                let params = params::KvWrite {
                    width: word(width)?,
                    k_stride: word(stride(width))?,
                    v_stride: word(stride(width))?,
                };
                let (k, v) = (Place::Activation(k), Place::Activation(v));
                let storage = [k, v, Place::Keys(kv), Place::Values(kv), Place::BlockTable];
                let kernel = format!("kv_write_{}", self.kv.name());
                recipe(&kernel, &params, &storage, Rows::Tokens, (width / 2, 64))
            }
            Op::Attention { kv, q, out, heads, scale, window, softcap, causal } => {
                let shape = self.graph.kv_spec(kv);
                let head_dim = shape.head_dim;
                check_head_dim(head_dim)?;
                expect(shape.kv_heads > 0 && heads % shape.kv_heads == 0, op)?;
                let width = heads * head_dim;
                expect(self.width(q) == width && self.width(out) == width, op)?;
                let params = params::Attention {
                    heads: word(heads)?,
                    kv_heads: word(shape.kv_heads)?,
                    head_dim: word(head_dim)?,
                    q_stride: word(stride(width))?,
                    result_stride: word(stride(width))?,
                    window: word(window.unwrap_or(0))?,
                    scale,
                    softcap: softcap.unwrap_or(0.0),
                    ahead: match (causal, window) {
                        (true, _) => 0,
                        (false, None) => u32::MAX,
                        (false, Some(window)) => word(window)?.saturating_sub(1),
                    },
                    chunk: 0,
                };
                expect(window != Some(0) && softcap != Some(0.0), op)?;
                let (q, out) = (Place::Activation(q), Place::Activation(out));
                let storage = [q, Place::Keys(kv), Place::Values(kv), out, Place::BlockTable];
                let kernel = format!("attention_{}", self.kv.name());
                let mut single = recipe(&kernel, &params, &storage, Rows::Tokens, (heads, 1));
                // The kernels for many tokens know no later ones.
                let many = match causal {
                    true => self.attention_batch(&params, &storage)?,
                    false => None,
                };
                let Some((many, from)) = many else {
                    return Ok(vec![single]);
                };
                single.when = 1..=from - 1;
                return Ok(vec![single, many]);
            }
            Op::Conv { state, x, filter, out, form } => {
                self.conv(op, state, (x, filter, out), form)?
            }
            Op::AttendChunk { kv, q, out, heads, scale, chunk } => {
                let shape = self.graph.kv_spec(kv);
                check_head_dim(shape.head_dim)?;
                let width = heads * shape.head_dim;
                expect(shape.kv_heads > 0 && heads % shape.kv_heads == 0 && chunk > 0, op)?;
                expect(self.width(q) == width && self.width(out) == width, op)?;
                let params = params::Attention {
                    heads: word(heads)?,
                    kv_heads: word(shape.kv_heads)?,
                    head_dim: word(shape.head_dim)?,
                    q_stride: word(stride(width))?,
                    result_stride: word(stride(width))?,
                    window: 0,
                    scale,
                    softcap: 0.0,
                    ahead: 0,
                    chunk: word(chunk)?,
                };
                let (q, out) = (Place::Activation(q), Place::Activation(out));
                let storage = [q, Place::Keys(kv), Place::Values(kv), out, Place::BlockTable];
                let kernel = format!("attention_{}", self.kv.name());
                recipe(&kernel, &params, &storage, Rows::Tokens, (heads, 1))
            }
            Op::AttendSinks { .. } => return self.attend_sinks(op),
            Op::Scale { x, weight } => {
                expect(self.graph.weight_spec(weight).cols == 1, op)?;
                let all = stride(self.width(x));
                let params = params::Scale { stride: word(all)? };
                let storage = [self.vector(weight)?, Place::Activation(x)];
                recipe("scale", &params, &storage, Rows::Tokens, (all, 64))
            }
            Op::Temper { x, each, scale } => {
                expect(each > 0, op)?;
                let width = self.width(x);
                let (of, each) = (word(stride(width))?, word(each)?);
                let params = params::Temper { width: word(width)?, stride: of, each, scale };
                recipe("temper", &params, &[Place::Activation(x)], Rows::Tokens, (width, 64))
            }
            Op::WeighInput { x, logits, out } => {
                let width = self.width(x);
                expect(self.width(out) == width && ![x, logits].contains(&out), op)?;
                let params = params::WeighInput {
                    width: word(width)?,
                    stride: word(stride(width))?,
                    logits: word(self.width(logits))?,
                    logits_stride: word(stride(self.width(logits)))?,
                };
                let storage = [x, logits, out].map(Place::Activation);
                recipe("weigh_input", &params, &storage, Rows::Tokens, (width, 64))
            }
            Op::Delta { .. } => self.delta(op)?,
            Op::Heads { x, from, out, to, heads, width } => {
                let fits = |of: Heads, buf| {
                    heads > 0 && of.start + (heads - 1) * of.stride + width <= self.width(buf)
                };
                expect(x != out && width > 0 && fits(from, x) && fits(to, out), op)?;
                expect(to.stride >= width || heads == 1, op)?;
                let params = params::Heads {
                    heads: word(heads)?,
                    width: word(width)?,
                    source_row: word(stride(self.width(x)))?,
                    result_row: word(stride(self.width(out)))?,
                    source_start: word(from.start)?,
                    source_stride: word(from.stride)?,
                    result_start: word(to.start)?,
                    result_stride: word(to.stride)?,
                };
                let storage = [x, out].map(Place::Activation);
                recipe("heads", &params, &storage, Rows::Tokens, (heads * width, 64))
            }
            Op::Gated { gate, up, out, activation } => self.gated(op, gate, up, out, activation)?,
            Op::Add { x, y } => {
                let quads = stride(self.width(x)) / 4;
                expect(self.width(x) == self.width(y), op)?;
                let params = params::Add { stride: word(quads)? };
                let storage = [Place::Activation(y), Place::Activation(x)];
                recipe("add", &params, &storage, Rows::Tokens, (quads, 64))
            }
            Op::AddGated { x, y, gate } => {
                let quads = stride(self.width(x)) / 4;
                let apart = x != y && gate != x && gate != y;
                expect(apart && self.width(x) == self.width(y) && self.width(gate) == 1, op)?;
                let gate_stride = word(stride(self.width(gate)))?;
                let params = params::AddGated { stride: word(quads)?, gate_stride };
                let storage = [y, gate, x].map(Place::Activation);
                recipe("add_gated", &params, &storage, Rows::Tokens, (quads, 64))
            }
            Op::Route { moe, logits, scoring, bias } => {
                let spec = self.graph.moe_spec(moe);
                let experts = spec.experts.len();
                expect(self.width(logits) == experts, op)?;
                expect((1..=experts).contains(&spec.top_k), op)?;
                let scoring = ScoringWords::of(scoring);
                let biases = self.selection(bias, experts)?;
                let params = params::Route {
                    experts: word(experts)?,
                    top_k: word(spec.top_k)?,
                    stride: word(stride(experts))?,
                    renormalise: scoring.renormalise,
                    sigmoid: scoring.sigmoid,
                    biased: scoring.biased(bias),
                    scale: scoring.scale,
                    groups: scoring.groups,
                    kept: scoring.kept,
                };
                expect(scoring.holds(experts, bias), op)?;
                let logits = Place::Activation(logits);
                let storage = [logits, Place::Ids(moe), Place::RoutingWeights(moe), biases];
                let route = recipe("route", &params, &storage, Rows::Tokens, (1, 64));
                let group = self.group(moe, spec)?;
                return Ok([vec![route], group].concat());
            }
            Op::Experts { moe, x, out } => {
                let spec = self.graph.moe_spec(moe);
                expect(self.width(x) == spec.hidden && self.width(out) == spec.hidden, op)?;
                let params = params::ExpertSum {
                    cols: word(spec.hidden)?,
                    top_k: word(spec.top_k)?,
                    pair_stride: word(stride(spec.hidden))?,
                    result_stride: word(stride(spec.hidden))?,
                };
                let (out, weights) = (Place::Activation(out), Place::RoutingWeights(moe));
                let storage = [Place::PairOutputs, weights, out];
                let items = (spec.hidden, 64);
                match spec.biases {
                    None => recipe("expert_sum", &params, &storage, Rows::Tokens, items),
                    Some(biases) => {
                        let biases = self.biases(biases.down, spec.experts.len() * spec.hidden)?;
                        let storage = [&storage[..], &[Place::Ids(moe), biases]].concat();
                        recipe("expert_sum_biased", &params, &storage, Rows::Tokens, items)
                    }
                }
            }
        };
        Ok(vec![one])
    }

    /// Rows of a table by token (and a factor), or `by` something else and added.
    pub fn embed(
        &mut self,
        table: WeightId,
        out: Buf,
        (by, scale): (u32, f32),
    ) -> Result<Vec<Recipe>> {
        let quads = stride(self.width(out)) / 4;
        let result = Place::Activation(out);
        let mut dispatches = Vec::new();
        for (index, range) in self.matrix(table)?.iter().enumerate() {
            if range.packed.cols != self.width(out) {
                return Err(refused(format!("an embedding of {} columns", range.packed.cols)));
            }
            let params = params::Embed {
                table: range.packed.matrix(range.at),
                row_start: word(range.row_start)?,
                rows: word(range.packed.rows)?,
                cols: word(range.packed.cols)?,
                stride: word(quads)?,
                scale,
                by,
            };
            let kernel = format!("embed_{}", range.packed.dtype.file_name());
            let storage = [Place::Tokens, range.place(table, index), result];
            let items = (quads, 64);
            dispatches.push(recipe(&kernel, &params, &storage, Rows::Tokens, items));
        }
        Ok(dispatches)
    }

    fn linear(
        &mut self,
        x: Buf,
        weight: WeightId,
        bias: Option<WeightId>,
        result: Place,
        result_stride: usize,
        rows: Rows,
    ) -> Result<Vec<Recipe>> {
        let (reduce, per_workgroup) = self.reduction();
        let bias_buffer = match bias {
            Some(id) => {
                let rows = self.graph.weight_spec(weight).rows;
                if self.graph.weight_spec(id).cols != rows {
                    return Err(refused(format!("a bias that does not have {rows} elements")));
                }
                self.vector(id)?
            }
            None => Place::Empty,
        };
        let mut dispatches = Vec::new();
        for (index, range) in self.matrix(weight)?.iter().enumerate() {
            if range.packed.cols != self.width(x) {
                let name = &self.graph.weight_spec(weight).tensor;
                return Err(refused(format!("{name} over {} columns", self.width(x))));
            }
            let params = params::Linear {
                weight: range.packed.matrix(range.at),
                row_start: word(range.row_start)?,
                rows: word(range.packed.rows)?,
                x_stride: word(stride(self.width(x)) / 4)?,
                result_stride: word(result_stride)?,
                has_bias: u32::from(bias.is_some()),
                logits: u32::from(rows == Rows::Logits),
            };
            let kernel = format!("linear_{}_{reduce}", range.packed.dtype.file_name());
            let weights = range.place(weight, index);
            let storage = [Place::Activation(x), weights, bias_buffer, result];
            let items = (range.packed.rows, per_workgroup);
            let mut single = recipe(&kernel, &params, &storage, rows, items);
            let product = LinearBatch {
                dtype: range.packed.dtype,
                params,
                x,
                weights,
                bias: bias_buffer,
                result,
                rows,
            };
            let (many, from) = self.linear_batch(&product)?;
            single.when = 1..=from - 1;
            dispatches.push(single);
            dispatches.extend(many);
        }
        Ok(dispatches)
    }

    /// What the choice of experts adds to their scores.
    pub fn selection(&self, bias: Option<WeightId>, experts: usize) -> Result<Place> {
        let Some(id) = bias else { return Ok(Place::Empty) };
        match self.graph.weight_spec(id).cols == experts {
            true => self.vector(id),
            false => {
                Err(refused(format!("a selection bias that does not have {experts} elements")))
            }
        }
    }

    /// The cap of the logits, if there is one.
    pub fn softcap(&self, cap: Option<f32>) -> Result<Option<Recipe>> {
        let Some(cap) = cap else { return Ok(None) };
        let params = params::Softcap { width: word(self.graph.vocab)?, cap };
        let items = (self.graph.vocab, 64);
        Ok(Some(recipe("softcap", &params, &[Place::Logits], Rows::Logits, items)))
    }

    fn rms_norm(
        &mut self,
        op: &Op,
        x: Buf,
        weight: WeightId,
        out: Buf,
        eps: f32,
    ) -> Result<Recipe> {
        let (reduce, per_workgroup) = self.reduction();
        let cols = self.graph.weight_spec(weight).cols;
        expect(
            cols > 0 && self.width(x).is_multiple_of(cols) && self.width(x) == self.width(out),
            op,
        )?;
        let groups = self.width(x) / cols;
        let row = word(stride(self.width(x)))?;
        let params = params::RmsNorm {
            cols: word(cols)?,
            groups: word(groups)?,
            source_stride: row,
            result_stride: row,
            eps,
        };
        let weight = self.vector(weight)?;
        let (source, result) = (Place::Activation(x), Place::Activation(out));
        let items = (groups, per_workgroup);
        Ok(if x == out {
            let kernel = format!("rms_norm_inplace_{reduce}");
            recipe(&kernel, &params, &[result, weight], Rows::Tokens, items)
        } else {
            let kernel = format!("rms_norm_split_{reduce}");
            recipe(&kernel, &params, &[source, weight, result], Rows::Tokens, items)
        })
    }

    fn gated(&mut self, op: &Op, gate: Buf, up: Buf, out: Buf, act: Activation) -> Result<Recipe> {
        let width = self.width(out);
        expect(self.width(gate) == width && self.width(up) == width, op)?;
        let params = params::Gated {
            stride: word(stride(width))?,
            activation: activation_code(act),
            swapped: u32::from(out == up),
        };
        let items = (stride(width), 64);
        let [g, u, o] = [gate, up, out].map(Place::Activation);
        Ok(if out == gate {
            recipe("gated_inplace", &params, &[o, u], Rows::Tokens, items)
        } else if out == up {
            recipe("gated_inplace", &params, &[o, g], Rows::Tokens, items)
        } else {
            recipe("gated_split", &params, &[g, u, o], Rows::Tokens, items)
        })
    }

    /// An `Experts` op's dispatches for each chunk of slots that fits the layer.
    pub fn waves(&mut self, moe: MoeId, x: Buf) -> Result<Vec<Option<Vec<Recipe>>>> {
        let spec = self.graph.moe_spec(moe);
        let mut waves = Vec::new();
        for (index, shape) in self.chunks.iter().enumerate() {
            let fits = |packed: &super::repack::Packed, rows, cols| {
                packed.rows == rows && packed.cols == cols
            };
            if fits(&shape.gate.0, spec.ff, spec.hidden)
                && fits(&shape.up.0, spec.ff, spec.hidden)
                && fits(&shape.down.0, spec.hidden, spec.ff)
            {
                let places = (Place::Table(moe), index * spec.experts.len());
                waves.push(Some(self.wave(moe, x, index, places)?));
            } else {
                waves.push(None);
            }
        }
        Ok(waves)
    }

    /// The dispatches of a chunk's experts. `places` is the table in which the kernels look up
    /// slots, and the word at which this layer's experts begin.
    pub fn wave(
        &mut self,
        moe: MoeId,
        x: Buf,
        index: usize,
        (table, slots_at): (Place, usize),
    ) -> Result<Vec<Recipe>> {
        let spec = self.graph.moe_spec(moe);
        let (reduce, per_workgroup) = self.reduction();
        let shape = &self.chunks[index];
        let ((gate, gate_at), (up, up_at), (down, down_at)) = (shape.gate, shape.up, shape.down);
        if gate.dtype != up.dtype {
            return Err(mixed_experts(gate.dtype, up.dtype));
        }
        let slot_stride = word(shape.stride / 4)?;
        let slots_at = word(slots_at)?;
        let (ids, weights) = (Place::Ids(moe), Place::Slots(index));
        let inner = Place::PairInner;
        let gate_up = params::ExpertGateUp {
            gate: gate.matrix(gate_at),
            up: up.matrix(up_at),
            rows: word(spec.ff)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            slots_at,
            x_stride: word(stride(spec.hidden) / 4)?,
            result_stride: word(stride(spec.ff))?,
            activation: activation_code(spec.activation),
        };
        let biases =
            spec.biases.map(|of| self.biases(of.gate_up, 2 * spec.ff * spec.experts.len()));
        let biases = biases.transpose()?;
        let biased = if biases.is_some() { "biased_" } else { "" };
        let kernel = format!("expert_gate_up_{biased}{}_{reduce}", gate.dtype.file_name());
        let mut storage = vec![Place::Activation(x), weights, ids, table, inner];
        storage.extend(biases);
        let items = (spec.ff * spec.top_k, per_workgroup);
        let first = recipe(&kernel, &gate_up, &storage, Rows::Tokens, items);
        let down_params = params::ExpertDown {
            down: down.matrix(down_at),
            rows: word(spec.hidden)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            slots_at,
            x_stride: word(stride(spec.ff) / 4)?,
            result_stride: word(stride(spec.hidden))?,
        };
        let kernel = format!("expert_down_{}_{reduce}", down.dtype.file_name());
        let storage = [inner, weights, ids, table, Place::PairOutputs];
        let items = (spec.hidden * spec.top_k, per_workgroup);
        let second = recipe(&kernel, &down_params, &storage, Rows::Tokens, items);
        let mut wave = vec![first, second];
        let experts = ExpertProducts {
            spec,
            x,
            inner: gate.dtype,
            outer: down.dtype,
            gate_up,
            down: down_params,
            biases,
            weights,
            table,
        };
        if let Some((many, from)) = self.experts_batch(&experts)? {
            wave.iter_mut().for_each(|single| single.when = 1..=from - 1);
            wave.extend(many);
        }
        Ok(wave)
    }
}

/// A scoring as the routing kernels read it.
pub(super) struct ScoringWords {
    pub renormalise: u32,
    pub sigmoid: u32,
    pub scale: f32,
    /// 1 without groups.
    pub groups: u32,
    pub kept: u32,
    /// Whether what stands in the place of the bias is a factor of the weights.
    factors: bool,
}

/// The most groups of experts (kernels/shared/groups.wgsl).
const GROUPS_MAX: u32 = 32;

impl ScoringWords {
    pub const fn of(scoring: Scoring) -> Self {
        let (sigmoid, scale, groups, kept) = match scoring {
            Scoring::Softmax { .. } | Scoring::Scaled => (0, 1.0, 1, 1),
            Scoring::Sigmoid { scale, .. } => (1, scale, 1, 1),
            Scoring::Grouped { scale, groups, kept, .. } => (1, scale, groups, kept),
            Scoring::Mixer { jitter } => (2, 2.0 * jitter, 1, 1),
        };
        let renormalise = match scoring {
            Scoring::Softmax { renormalise }
            | Scoring::Sigmoid { renormalise, .. }
            | Scoring::Grouped { renormalise, .. } => renormalise as u32,
            Scoring::Scaled => 1,
            Scoring::Mixer { .. } => 0,
        };
        let factors = matches!(scoring, Scoring::Scaled);
        Self { renormalise, sigmoid, scale, groups, kept, factors }
    }

    /// What the kernels are told of the bias: 0 without one, 1 if it chooses, 2 for factors.
    pub fn biased(&self, bias: Option<WeightId>) -> u32 {
        u32::from(bias.is_some()) + u32::from(bias.is_some() && self.factors)
    }

    /// Whether the kernels can choose among so many experts in these groups. Groups need a bias.
    pub fn holds(&self, experts: usize, bias: Option<WeightId>) -> bool {
        let Self { groups, kept, .. } = *self;
        groups == 1
            || bias.is_some()
                && (1..=groups).contains(&kept)
                && groups <= GROUPS_MAX
                && experts.is_multiple_of(groups as usize)
                && experts / groups as usize > 1
    }
}

pub(super) const fn activation_code(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::SquaredRelu => 3,
        Activation::Tanh => 4,
        Activation::Sigmoid => 5,
        // Only with biases (biased.rs).
        Activation::Clamped => 6,
    }
}

pub(super) fn refused(what: String) -> BackendError {
    BackendError::Unsupported(what)
}

/// Refuses what can be recognised from the graph alone, before any weight is loaded.
pub(super) fn check(graph: &Graph) -> Result<()> {
    super::biased::check(graph)?;
    graph.kv.iter().try_for_each(|kv| check_head_dim(kv.head_dim))
}

pub(super) fn check_head_dim(head_dim: usize) -> Result<()> {
    if head_dim.is_multiple_of(4) && head_dim <= HEAD_DIM_MAX {
        return Ok(());
    }
    Err(refused(format!(
        "attention heads of {head_dim} elements (a GPU takes multiples of 4 up to {HEAD_DIM_MAX}); \
         the CPU takes them: --backend cpu"
    )))
}

/// The error for experts whose gate and up matrices are stored differently.
pub(super) fn mixed_experts(gate: DType, up: DType) -> BackendError {
    refused(format!(
        "experts whose gate matrices are {gate} and whose up matrices are {up}; the CPU takes \
         them: --backend cpu"
    ))
}

pub(super) fn expect(holds: bool, op: &Op) -> Result<()> {
    if holds { Ok(()) } else { Err(refused(format!("{} of these sizes", name(op)))) }
}

/// The name of an op in an error.
const fn name(op: &Op) -> &'static str {
    match op {
        Op::Embed { .. } | Op::EmbedMore { .. } => "an embedding",
        Op::States { .. } => "states",
        Op::RmsNorm { .. } | Op::LayerNorm { .. } => "a norm",
        Op::Activate { .. } => "an activation",
        Op::Linear { .. } => "a matrix product",
        Op::Rope { .. } => "a rotary position embedding",
        Op::KvWrite { .. } => "a write to the attention cache",
        Op::Attention { .. } => "attention",
        Op::Conv { .. } => "a short convolution",
        Op::AttendChunk { .. } => "attention within chunks",
        Op::AttendSinks { .. } => "attention with sinks",
        Op::Scale { .. } => "a layer's factor",
        Op::Temper { .. } => "queries that grow with their position",
        Op::WeighInput { .. } => "an expert's weighed input",
        Op::Delta { .. } => "a delta net",
        Op::Heads { .. } => "a copy of parts of heads",
        Op::Gated { .. } => "a gated activation",
        Op::Add { .. } => "a sum",
        Op::AddGated { .. } => "a gated sum",
        Op::Route { .. } => "a router",
        Op::Experts { .. } => "experts",
        Op::Logits { .. } => "logits",
    }
}

pub(super) fn word(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| refused(format!("a size of {n}")))
}
