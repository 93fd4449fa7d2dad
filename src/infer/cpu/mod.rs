//! The CPU backend: one twin for each kernel, with the same name and bindings.
//!
//! Weights and experts stay in their stored block format; arithmetic is in f32. A row's inner
//! product is computed in the same way in any thread, wave or slot, so paging experts never changes
//! a bit of the result.

pub mod activate;
pub mod add;
pub mod add_gated;
pub mod attention;
pub mod attention_coop;
pub mod attention_sinks;
pub mod attention_sinks_tile;
pub mod attention_tile;
mod bandwidth;
pub mod conv;
pub mod copy;
pub mod decode_aside;
pub mod decode_attention;
pub mod decode_combine;
pub mod decode_combine_sinks;
pub mod decode_expert_down;
pub mod decode_expert_down_biased;
pub mod decode_expert_gate_up;
pub mod decode_expert_gate_up_biased;
pub mod decode_fetch;
pub mod decode_gate_up;
pub mod decode_layer_norm;
pub mod decode_linear;
pub mod decode_norm;
pub mod decode_norm_add;
pub mod decode_norm_add_norm;
pub mod decode_pack;
pub mod decode_route;
pub mod decode_seek;
pub mod decode_unpack;
pub mod delta;
pub mod embed;
pub mod expert_down;
pub mod expert_down_coop;
pub mod expert_down_tile;
pub mod expert_gate_up;
pub mod expert_gate_up_biased;
pub mod expert_gate_up_biased_tile;
pub mod expert_gate_up_coop;
pub mod expert_gate_up_tile;
pub mod expert_group;
pub mod expert_sum;
pub mod expert_sum_biased;
pub mod gated;
mod gemm;
pub mod halve;
pub mod halves;
pub mod heads;
pub(crate) mod k_dot;
pub mod kv_write;
pub(crate) mod lanes;
pub mod layer_norm;
pub mod linear;
pub mod linear_coop;
pub mod linear_tile;
pub mod matrix;
mod moe;
pub mod pack;
mod parts;
mod recurrent;
pub mod rms_norm;
pub mod rope;
pub mod route;
pub(crate) mod row_dot;
pub mod rows_gate_up;
pub mod rows_linear;
pub mod sample_cut;
pub mod sample_draw;
pub mod sample_greedy;
pub mod sample_keys;
pub mod sample_ranks;
pub mod sample_top_k;
pub mod sample_top_p;
pub mod scale;
mod simd;
pub mod softcap;
pub mod states;
pub mod sum_parts;
pub mod temper;
#[cfg(test)]
mod tests;
pub(crate) mod unpack;
pub mod weigh_input;
pub(crate) mod wide;

use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use attention::Attention;
use kv_write::Cache;
use linear::Product;
use matrix::Matrix;
use moe::{Pairs, SlotBytes};
use parts::Part;
use rayon::prelude::*;
use recurrent::Recurrent;
use rope::Angles;

use super::backend::{
    Backend, BackendError, Bandwidth, Capacity, Counters, Device, Fed, LogitRows, Ops, Progress,
    Result, Row, Slot, SlotClass, Step, Taken, Want,
};
use super::graph::{
    Buf, ExpertLayout, Graph, KvId, Lookup, MatrixSpec, MoeId, Op, WeightId, segment_of, token_of,
};
use super::kv::{self, BlockCopy};
use super::walk::Walk;

/// Below this many multiplications between two decisions of the host, ops run on the calling
/// thread. Otherwise they are moved to the thread pool first.
const POOL_MIN: usize = 1 << 21;
/// Below this many multiplications of queries and keys, sequences attend one after another.
const ATTEND_MIN: usize = 1 << 17;

/// Makes [`CpuBackend`]s. They use the threads of rayon's current pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuDevice;

impl Device for CpuDevice {
    fn backend(&self, graph: Arc<Graph>, capacity: Capacity) -> Result<Box<dyn Backend>> {
        Ok(Box::new(CpuBackend::new(graph, capacity)))
    }

    fn bandwidth(&self) -> Result<Bandwidth> {
        Ok(bandwidth::bandwidth())
    }
}

/// A trunk tensor as stored. Vectors (norms, biases) are also kept as f32.
struct Weight {
    spec: MatrixSpec,
    bytes: Vec<u8>,
    vector: Vec<f32>,
}

/// A model on the CPU.
pub struct CpuBackend {
    graph: Arc<Graph>,
    capacity: Capacity,
    /// One per graph buffer, `[batch, width]`.
    buffers: Vec<Vec<f32>>,
    weights: Vec<Option<Weight>>,
    caches: Vec<Cache>,
    recurrent: Recurrent,
    /// The blocks of the sequence that steps next.
    blocks: Vec<u32>,
    /// Whether ropes have the form for long sequences.
    stretched: bool,
    clamped: u64,
    walk: Walk,
    slots: Vec<SlotBytes>,
    /// The current step's tokens, and whose they are.
    tokens: Vec<u32>,
    parts: Vec<Part>,
    wanted: LogitRows,
    /// One per graph rope, for the current step's positions.
    angles: Vec<Angles>,
    /// The state of a layer between its `Route` and its `finish_experts`.
    pairs: Pairs,
    logits: Vec<f32>,
    counters: Counters,
}

impl CpuBackend {
    pub fn new(graph: Arc<Graph>, capacity: Capacity) -> Self {
        let Capacity { context, kv: format, .. } = capacity;
        let count = kv::blocks(context);
        let cache = |kv: &super::graph::Kv| Cache::new(kv.kv_heads, kv.head_dim, count, format);
        Self {
            buffers: graph.buffers.iter().map(|b| vec![0.0; b.width * capacity.batch]).collect(),
            weights: graph.weights.iter().map(|_| None).collect(),
            caches: graph.kv.iter().map(cache).collect(),
            recurrent: Recurrent::new(&graph),
            blocks: (0..count as u32).collect(),
            stretched: false,
            clamped: 0,
            walk: Walk::new(&graph),
            slots: Vec::new(),
            tokens: Vec::new(),
            parts: Vec::new(),
            wanted: LogitRows::None,
            angles: Vec::new(),
            pairs: Pairs::default(),
            logits: Vec::new(),
            counters: Counters { device_seconds: Some(0.0), ..Counters::default() },
            graph,
            capacity,
        }
    }

    /// Begins a step of these tokens.
    fn begin_parts(&mut self, tokens: Vec<u32>, parts: Vec<Part>, wanted: LogitRows) -> Result<()> {
        let (count, batch) = (tokens.len(), self.capacity.batch);
        let off = parts.iter().find(|part| part.end() > part.blocks.len() * kv::BLOCK);
        if !(1..=batch).contains(&count) || off.is_some() {
            let (at, blocks) = off.map_or((0, 0), |part| (part.position, part.blocks.len()));
            return Err(BackendError::Unsupported(format!(
                "a step of {count} tokens (batch {batch}), or position {at} in {blocks} blocks"
            )));
        }
        if let Some(token) = tokens.iter().find(|token| !self.graph.admits(**token)) {
            let vocab = self.graph.vocab;
            return Err(BackendError::Unsupported(format!(
                "token {token} of a {vocab} vocabulary"
            )));
        }
        (self.tokens, self.parts, self.wanted) = (tokens, parts, wanted);
        self.logits.clear();
        let angles = |rope| Angles::new(rope, self.stretched, self.positions());
        self.angles = self.graph.ropes.iter().map(angles).collect();
        Ok(())
    }

    /// Runs this many ops by calling `work`, and counts them.
    fn counted(&mut self, ops: usize, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let started = Instant::now();
        let result = work(self);
        self.counters.dispatches += ops as u64;
        self.counters.submissions += 1;
        if let Some(seconds) = &mut self.counters.device_seconds {
            *seconds += started.elapsed().as_secs_f64();
        }
        result
    }

    /// The batch's rows of a buffer.
    fn rows(&self, buf: Buf) -> &[f32] {
        &self.buffers[usize::from(buf.0)][..self.tokens.len() * self.graph.width(buf)]
    }

    /// Runs `kernel` on the batch's rows of `out`. While it runs, `out` is empty in `self`.
    fn with_out(
        &mut self,
        out: Buf,
        kernel: impl FnOnce(&Self, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let len = self.tokens.len() * self.graph.width(out);
        let mut buffer = mem::take(&mut self.buffers[usize::from(out.0)]);
        let result = kernel(self, &mut buffer[..len]);
        self.buffers[usize::from(out.0)] = buffer;
        result
    }

    fn weight(&self, id: WeightId) -> Result<&Weight> {
        self.weights[id.0 as usize].as_ref().ok_or_else(|| {
            let name = &self.graph.weight_spec(id).tensor;
            BackendError::Unsupported(format!("a step before weight {name} was loaded"))
        })
    }

    fn matrix(&self, id: WeightId) -> Result<Matrix<'_>> {
        self.weight(id).map(|weight| Matrix::new(&weight.spec, &weight.bytes))
    }

    /// Multiplications in the linear ops of `ops`, for the current batch.
    fn work(&self, ops: &[Op]) -> usize {
        let weights = ops.iter().map(|op| match op {
            Op::Linear { weight, .. } | Op::Logits { weight, .. } => {
                let weight = self.graph.weight_spec(*weight);
                weight.rows * weight.cols
            }
            _ => 0,
        });
        weights.sum::<usize>() * self.tokens.len()
    }

    fn ops(&mut self, mut ops: &[Op]) -> Result<()> {
        while let Some(op) = ops.first() {
            let together = Op::products_of_one_input(ops);
            match together {
                0 | 1 => self.op(op)?,
                _ => self.linears(&ops[..together])?,
            }
            ops = &ops[together.max(1)..];
        }
        Ok(())
    }

    /// Runs several linear ops with the same input at once.
    fn linears(&mut self, ops: &[Op]) -> Result<()> {
        let parts = ops.iter().filter_map(|op| match op {
            Op::Linear { x, weight, bias, out } => Some((*x, *weight, *bias, *out)),
            _ => None,
        });
        let parts: Vec<_> = parts.collect();
        let Some((x, ..)) = parts.first().copied() else { return Ok(()) };
        let tokens = self.tokens.len();
        let take =
            |(_, _, _, out): &(_, _, _, Buf)| mem::take(&mut self.buffers[usize::from(out.0)]);
        let mut buffers: Vec<Vec<f32>> = parts.iter().map(take).collect();
        let mut run = || {
            let mut products = Vec::with_capacity(parts.len());
            for ((_, weight, bias, out), buffer) in parts.iter().zip(&mut buffers) {
                let bias = bias.map(|id| self.weight(id)).transpose()?;
                products.push(Product {
                    weight: self.matrix(*weight)?,
                    bias: bias.map(|weight| weight.vector.as_slice()),
                    out: &mut buffer[..tokens * self.graph.width(*out)],
                });
            }
            linear::linears(self.rows(x), self.graph.width(x), &mut products, self.singles());
            Ok(())
        };
        let result = run();
        for ((_, _, _, out), buffer) in parts.iter().zip(buffers) {
            self.buffers[usize::from(out.0)] = buffer;
        }
        result
    }

    // Long: one arm an op.
    fn op(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Embed { table, out, scale } => self.with_out(out, |this, out| {
                let ids: Vec<u32> = this.tokens.iter().map(|fed| token_of(*fed)).collect();
                embed::embed(&ids, this.matrix(table)?, scale, out);
                Ok(())
            }),
            Op::EmbedMore { by, table, x } => self.with_out(x, |this, x| {
                let rows: Vec<u32> = match by {
                    Lookup::Position => this.positions().map(|at| at as u32).collect(),
                    Lookup::Segment => this.tokens.iter().map(|fed| segment_of(*fed)).collect(),
                };
                embed::embed_more(&rows, this.matrix(table)?, x);
                Ok(())
            }),
            Op::RmsNorm { x, weight, out, eps } => self.with_out(out, |this, rows| {
                if x != out {
                    rows.copy_from_slice(this.rows(x));
                }
                rms_norm::rms_norm(rows, &this.weight(weight)?.vector, eps);
                Ok(())
            }),
            Op::LayerNorm { x, weight, bias, out, eps } => self.with_out(out, |this, rows| {
                if x != out {
                    rows.copy_from_slice(this.rows(x));
                }
                let bias = bias.map(|id| this.weight(id)).transpose()?;
                let bias = bias.map(|weight| weight.vector.as_slice());
                layer_norm::layer_norm(rows, &this.weight(weight)?.vector, bias, eps);
                Ok(())
            }),
            Op::Activate { x, activation } => self.with_out(x, |_, x| {
                activate::activate(x, activation);
                Ok(())
            }),
            Op::Linear { x, weight, bias, out } => self.with_out(out, |this, out| {
                let bias = bias.map(|id| this.weight(id)).transpose()?;
                let bias = bias.map(|weight| weight.vector.as_slice());
                let products = &mut [Product { weight: this.matrix(weight)?, bias, out }];
                linear::linears(this.rows(x), this.graph.width(x), products, this.singles());
                Ok(())
            }),
            Op::Rope { x, heads, head_dim, rope } => self.with_out(x, |this, x| {
                let half = this.graph.rope_spec(rope).inv_freq.len();
                let angles = &this.angles[usize::from(rope.0)];
                rope::rope(x, heads, head_dim, half, angles);
                Ok(())
            }),
            Op::KvWrite { kv, k, v } => {
                let mut cache = mem::take(&mut self.caches[usize::from(kv.0)]);
                let (width, ks, vs) = (self.graph.width(k), self.rows(k), self.rows(v));
                let write = |part: &Part| {
                    let (k, v) = (&ks[part.of(width)], &vs[part.of(width)]);
                    kv_write::kv_write(k, v, part.position, &part.blocks, &mut cache)
                };
                self.clamped += self.parts.iter().map(write).sum::<u64>();
                self.caches[usize::from(kv.0)] = cache;
                Ok(())
            }
            Op::Attention { kv, q, out, heads, scale, window, softcap, causal } => {
                self.with_out(out, |this, out| {
                    let (chunk, position) = (None, 0);
                    let params =
                        Attention { heads, scale, window, chunk, softcap, causal, position };
                    this.attend(kv, q, &params, None, out);
                    Ok(())
                })
            }
            Op::Conv { state, x, filter, out, form } => {
                let mut states = mem::take(&mut self.recurrent);
                let done = self.with_out(out, |this, out| {
                    let filter = &this.weight(filter)?.vector;
                    let (xs, from) = (this.rows(x), this.graph.width(x));
                    let to = out.len() / this.tokens.len();
                    for part in &this.parts {
                        let (before, after) = states.step(state, part);
                        let (x, out) = (&xs[part.of(from)], &mut out[part.of(to)]);
                        conv::conv(x, filter, form, before, after, from, out);
                    }
                    Ok(())
                });
                self.recurrent = states;
                done
            }
            Op::AttendChunk { kv, q, out, heads, scale, chunk } => {
                self.with_out(out, |this, out| {
                    let (position, chunk) = (0, Some(chunk));
                    let (window, softcap, causal) = (None, None, true);
                    let params =
                        Attention { heads, scale, window, chunk, softcap, causal, position };
                    this.attend(kv, q, &params, None, out);
                    Ok(())
                })
            }
            Op::AttendSinks { kv, q, out, heads, scale, window, sinks } => {
                self.with_out(out, |this, out| {
                    let (position, chunk, softcap, causal) = (0, None, None, true);
                    let params =
                        Attention { heads, scale, window, chunk, softcap, causal, position };
                    this.attend(kv, q, &params, Some(&this.weight(sinks)?.vector), out);
                    Ok(())
                })
            }
            Op::Scale { x, weight } => self.with_out(x, |this, rows| {
                scale::scale(rows, this.weight(weight)?.vector[0]);
                Ok(())
            }),
            Op::Temper { x, each, scale } => self.with_out(x, |this, rows| {
                let width = this.graph.width(x);
                for part in &this.parts {
                    temper::temper(&mut rows[part.of(width)], width, part.position, each, scale);
                }
                Ok(())
            }),
            Op::WeighInput { x, logits, out } => self.with_out(out, |this, out| {
                let count = this.graph.width(logits);
                weigh_input::weigh_input(this.rows(x), this.rows(logits), count, out);
                Ok(())
            }),
            Op::Delta { state, x, gates, decays, shifts, out, ref shape } => {
                let mut states = mem::take(&mut self.recurrent);
                let done = self.with_out(out, |this, out| {
                    let (decays, shifts) = (this.weight(decays)?, this.weight(shifts)?);
                    let weights = (&decays.vector[..], &shifts.vector[..]);
                    let (xs, gates) = (this.rows(x), this.rows(gates));
                    let each = |all: usize| all / this.tokens.len();
                    let (from, by, to) = (each(xs.len()), each(gates.len()), each(out.len()));
                    for part in &this.parts {
                        let (before, after) = states.step(state, part);
                        after.copy_from_slice(&before);
                        let (x, gates) = (&xs[part.of(from)], &gates[part.of(by)]);
                        delta::delta(x, gates, weights, shape, after, &mut out[part.of(to)]);
                    }
                    Ok(())
                });
                self.recurrent = states;
                done
            }
            Op::Heads { x, from, out, to, heads, width } => self.with_out(out, |this, rows| {
                let widths = (this.graph.width(x), this.graph.width(out));
                heads::heads((this.rows(x), from), (rows, to), widths, heads, width);
                Ok(())
            }),
            Op::Gated { gate, up, out, activation } => {
                // Works in place on a copy of the gate in `out`. If `out` is `up`, `up` is copied
                // first.
                let up_rows = (out == up).then(|| self.rows(up).to_vec());
                self.with_out(out, |this, rows| {
                    if out != gate {
                        rows.copy_from_slice(this.rows(gate));
                    }
                    let up = up_rows.as_deref().unwrap_or_else(|| this.rows(up));
                    gated::gated(rows, up, activation);
                    Ok(())
                })
            }
            Op::Add { x, y } => self.with_out(x, |this, x| {
                add::add(x, this.rows(y));
                Ok(())
            }),
            Op::AddGated { x, y, gate } => self.with_out(x, |this, x| {
                add_gated::add_gated(x, this.rows(y), this.rows(gate));
                Ok(())
            }),
            Op::Route { moe, logits, scoring, bias } => {
                let mut pairs = mem::take(&mut self.pairs);
                let bias = bias.map(|id| self.weight(id)).transpose()?;
                let bias = bias.map(|weight| weight.vector.as_slice());
                pairs.route(self.rows(logits), bias, self.graph.moe_spec(moe), scoring);
                self.pairs = pairs;
                Ok(())
            }
            Op::Experts { .. } => {
                Err(BackendError::Unsupported("an Experts op inside a plain run".into()))
            }
            Op::Logits { x, weight, bias, softcap } => {
                self.project_logits(x, weight, bias, softcap)
            }
            Op::States { x } => {
                let Some(first) = self.first_wanted() else { return Ok(()) };
                let mut result = mem::take(&mut self.logits);
                states::states(self.rows(x), self.graph.width(x), first, &mut result);
                self.logits = result;
                Ok(())
            }
        }
    }

    /// Whether each token's products are those of a step of its own.
    const fn singles(&self) -> bool {
        self.tokens.len() <= linear::SINGLES_MAX || self.parts.len() > 1
    }

    /// The positions of the step's tokens.
    fn positions(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().flat_map(Part::positions)
    }

    /// Attention of each sequence over its own blocks.
    fn attend(&self, kv: KvId, q: Buf, params: &Attention, sinks: Option<&[f32]>, out: &mut [f32]) {
        let (cache, qs, from) =
            (&self.caches[usize::from(kv.0)], self.rows(q), self.graph.width(q));
        let one = |part: &Part, out: &mut [f32]| {
            let params = Attention { position: part.position, ..*params };
            let (q, blocks) = (&qs[part.of(from)], &part.blocks);
            match sinks {
                None => attention::attention(q, cache, blocks, &params, out),
                Some(sinks) => {
                    attention_sinks::attention_sinks(q, cache, blocks, &params, sinks, out);
                }
            }
        };
        let to = out.len() / self.tokens.len();
        let work = self.parts.iter().map(Part::end).sum::<usize>() * from;
        if self.parts.len() == 1 || work < ATTEND_MIN {
            for part in &self.parts {
                one(part, &mut out[part.of(to)]);
            }
        } else {
            // One token each.
            let parts = self.parts.par_iter().zip(out.par_chunks_mut(to));
            parts.for_each(|(part, out)| one(part, out));
        }
    }

    /// The first row of the result. `None` if nothing is wanted.
    const fn first_wanted(&self) -> Option<usize> {
        match self.wanted {
            LogitRows::None => None,
            LogitRows::Last => Some(self.tokens.len() - 1),
            LogitRows::All => Some(0),
        }
    }

    fn project_logits(
        &mut self,
        x: Buf,
        weight: WeightId,
        bias: Option<WeightId>,
        softcap: Option<f32>,
    ) -> Result<()> {
        let width = self.graph.width(x);
        let Some(first) = self.first_wanted() else { return Ok(()) };
        let mut logits = mem::take(&mut self.logits);
        let matrix = self.matrix(weight)?;
        logits.resize((self.tokens.len() - first) * matrix.rows, 0.0);
        let bias = bias.map(|id| self.weight(id)).transpose()?;
        let bias = bias.map(|weight| weight.vector.as_slice());
        let singles = self.tokens.len() - first <= linear::SINGLES_MAX || self.parts.len() > 1;
        let products = &mut [Product { weight: matrix, bias, out: &mut logits }];
        linear::linears(&self.rows(x)[first * width..], width, products, singles);
        if let Some(cap) = softcap {
            softcap::softcap(&mut logits, cap);
        }
        self.logits = logits;
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        format!("cpu ({} threads, {})", rayon::current_num_threads(), simd::name())
    }

    fn weight_bytes(&self, spec: &MatrixSpec) -> u64 {
        spec.bytes() as u64
    }

    fn slot_bytes(&self, layout: &ExpertLayout) -> u64 {
        layout.bytes as u64
    }

    fn fixed_bytes(&self) -> u64 {
        let buffers: usize = self.buffers.iter().map(Vec::len).sum();
        let caches: usize = self.caches.iter().map(|cache| cache.k.len() + cache.v.len()).sum();
        ((buffers + caches) * size_of::<f32>()) as u64 + self.recurrent.bytes()
    }

    fn load_weight(&mut self, id: WeightId, spec: &MatrixSpec, bytes: &[u8]) -> Result<()> {
        let mut vector = Vec::new();
        if spec.rows == 1 {
            vector.resize(spec.cols, 0.0);
            Matrix::new(spec, bytes).unpack_row(0, &mut vector);
        }
        self.counters.uploaded_bytes += bytes.len() as u64;
        let weight = Weight { spec: *spec, bytes: bytes.to_vec(), vector };
        self.weights[id.0 as usize] = Some(weight);
        Ok(())
    }

    fn adapt(&mut self, graph: Arc<Graph>) -> Result<()> {
        let batch = self.capacity.batch;
        let kept = self.buffers.len().min(graph.buffers.len());
        self.buffers.truncate(kept);
        let more = graph.buffers[kept..].iter().map(|buffer| vec![0.0; buffer.width * batch]);
        self.buffers.extend(more);
        self.weights.resize_with(graph.weights.len(), || None);
        self.walk = Walk::new(&graph);
        self.graph = graph;
        Ok(())
    }

    fn alloc_slots(&mut self, classes: &[SlotClass], _: &[u16]) -> Result<()> {
        self.slots = classes.iter().map(SlotBytes::new).collect::<Result<_>>()?;
        Ok(())
    }

    fn fill_slot(&mut self, slot: Slot, bytes: &[u8]) -> Result<()> {
        self.counters.uploaded_bytes += bytes.len() as u64;
        self.slots[usize::from(slot.class)].expert_mut(slot.index).copy_from_slice(bytes);
        Ok(())
    }

    fn grow(&mut self, blocks: usize) -> Result<()> {
        self.caches.iter_mut().for_each(|cache| cache.grow(blocks));
        Ok(())
    }

    fn block_bytes(&self) -> u64 {
        let elements: usize = self.caches.iter().map(|cache| 2 * cache.block_len()).sum();
        (elements * size_of::<f32>()) as u64
    }

    fn class(&self) -> String {
        // The number of threads changes no sum.
        let format = self.caches.first().map(|cache| cache.format).unwrap_or_default();
        format!("cpu {} {format:?}", simd::name())
    }

    fn stored_bytes(&self) -> u64 {
        self.caches.iter().map(|cache| 2 * cache.half_bytes() as u64).sum()
    }

    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.stored_bytes() as usize);
        self.caches.iter().for_each(|cache| cache.read(block as usize, &mut bytes));
        Ok(bytes)
    }

    fn write_block(&mut self, block: u32, mut bytes: &[u8]) -> Result<()> {
        for cache in &mut self.caches {
            let (of, rest) = bytes.split_at(2 * cache.half_bytes());
            cache.write(block as usize, of);
            bytes = rest;
        }
        Ok(())
    }

    fn copy_block(&mut self, copy: BlockCopy) -> Result<()> {
        let (from, to) = (copy.from as usize, copy.to as usize);
        self.caches.iter_mut().for_each(|cache| cache.copy(from, to));
        Ok(())
    }

    fn set_blocks(&mut self, blocks: &[u32]) {
        blocks.clone_into(&mut self.blocks);
    }

    fn set_stretched(&mut self, long: bool) -> Result<()> {
        self.stretched = long;
        Ok(())
    }

    fn state_bytes(&self) -> u64 {
        self.recurrent.slot_bytes()
    }

    fn grow_states(&mut self, count: usize) -> Result<()> {
        self.recurrent.grow(count);
        Ok(())
    }

    fn copy_state(&mut self, copy: BlockCopy) -> Result<()> {
        self.recurrent.copy(copy.from as usize, copy.to as usize);
        Ok(())
    }

    fn set_state(&mut self, slot: u32) {
        self.recurrent.slot = slot as usize;
    }

    fn clamped(&self) -> u64 {
        self.clamped
    }

    fn room(&self) -> usize {
        1
    }

    fn rows_max(&self) -> usize {
        self.capacity.batch
    }

    fn queue_rows(&mut self, rows: &[Row<'_>], _taken: Taken, _want: Want) -> Result<()> {
        let part = |(at, row): (usize, &Row<'_>)| Part {
            rows: at..at + 1,
            position: row.position,
            blocks: row.blocks.to_vec(),
            slot: row.state as usize,
        };
        let tokens = rows.iter().map(|row| row.token).collect();
        self.begin_parts(tokens, rows.iter().enumerate().map(part).collect(), LogitRows::All)?;
        self.walk.start();
        Ok(())
    }

    fn queue(&mut self, fed: Fed<'_>, position: usize, want: Want) -> Result<()> {
        let (Fed::Tokens(tokens), Want::Logits(logits)) = (fed, want) else {
            return Err(BackendError::Unsupported("choosing tokens on the CPU backend".into()));
        };
        self.begin(&Step { tokens, position, logits })?;
        self.walk.start();
        Ok(())
    }

    fn advance(&mut self, guess: bool) -> Result<Progress> {
        let mut walk = mem::take(&mut self.walk);
        let progress = walk.advance(self, guess);
        self.walk = walk;
        progress
    }

    fn run_wave(&mut self, slots: &[Option<Slot>]) -> Result<()> {
        let op = self.walk.waits()?;
        self.run_experts(op, slots)
    }

    fn resume(&mut self, _moe: MoeId) -> Result<()> {
        Err(BackendError::Unsupported("resuming a step on the CPU backend".into()))
    }

    fn give_up(&mut self) {}

    fn logits(&mut self) -> Result<Vec<f32>> {
        Ok(mem::take(&mut self.logits))
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

impl Ops for CpuBackend {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        let part = Part {
            rows: 0..step.tokens.len(),
            position: step.position,
            blocks: self.blocks.clone(),
            slot: self.recurrent.slot,
        };
        self.begin_parts(step.tokens.to_vec(), vec![part], step.logits)
    }

    fn run(&mut self, ops: Range<usize>) -> Result<()> {
        let graph = Arc::clone(&self.graph);
        let ops = &graph.ops[ops];
        self.counted(ops.len(), |this| {
            if this.work(ops) < POOL_MIN {
                return this.ops(ops);
            }
            // Runs on a thread of the pool, so that each parallel region only wakes the others.
            rayon::scope(|_| this.ops(ops))
        })
    }

    fn guesses(&self) -> bool {
        true
    }

    fn routing(&mut self, _op: usize) -> Result<Vec<u32>> {
        Ok(self.pairs.ids().to_vec())
    }

    fn run_experts(&mut self, op: usize, slots: &[Option<Slot>]) -> Result<()> {
        let graph = Arc::clone(&self.graph);
        let Op::Experts { moe, x, .. } = graph.ops[op] else {
            return Err(BackendError::Unsupported(format!("op {op} is not an Experts op")));
        };
        // Gate and up, then down.
        self.counted(2, |this| {
            let mut pairs = mem::take(&mut this.pairs);
            let spec = graph.moe_spec(moe);
            let biases = spec.biases.map(|biases| this.weight(biases.gate_up)).transpose();
            let run = biases.map(|biases| {
                let biases = biases.map(|weight| &weight.vector[..]);
                pairs.run((this.rows(x), this.singles()), spec, biases, &this.slots, slots);
            });
            this.pairs = pairs;
            run
        })
    }

    fn finish_experts(&mut self, op: usize) -> Result<()> {
        let Op::Experts { moe, out, .. } = self.graph.ops[op] else {
            return Err(BackendError::Unsupported(format!("op {op} is not an Experts op")));
        };
        self.counted(1, |this| {
            this.with_out(out, |this, out| {
                let biases = this.graph.moe_spec(moe).biases;
                let biases = biases.map(|biases| this.weight(biases.down)).transpose()?;
                this.pairs.finish(biases.map(|weight| &weight.vector[..]), out)
            })
        })
    }
}
