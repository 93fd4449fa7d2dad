//! The activations, caches and tables of a backend: everything whose size follows from the graph
//! and the capacity. Allocated once.
//!
//! A row of activations is padded with zeros to whole units of 32 f32, so that kernels need not
//! check where a row ends. Nothing ever writes the padding.

use wgpu::BufferUsages;

use super::decode::{self, Layout};
use super::device::GpuDevice;
use super::lower::Place;
use super::params::Steps;
use super::readback::Readback;
use super::recurrent::Recurrent;
use super::repack::UNIT;
use super::tiles;
use crate::backend::{BackendError, Capacity, KvFormat, Result};
use crate::graph::{Buf, Graph, KvId, Moe, MoeId, Rope, RopeId};
use crate::kv::{self, BLOCK};
use crate::recurrent::RING;

/// Pairs of one tile, shared/pairs.wgsl.
pub(super) const PAIR_TILE: usize = 64;

/// The most device memory for the rows of logits that are computed at a time (but at least one
/// row).
const LOGITS_BYTES_MAX: usize = 16 << 20;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);
const UNIFORM: BufferUsages = BufferUsages::UNIFORM.union(BufferUsages::COPY_DST);

/// The stride, in f32, of a buffer of this width.
pub(super) const fn stride(width: usize) -> usize {
    width.next_multiple_of(UNIT)
}

/// Rows of logits in memory at a time.
fn logit_rows(graph: &Graph, batch: usize) -> usize {
    let row_bytes = graph.result_width().max(1).saturating_mul(4);
    (LOGITS_BYTES_MAX / row_bytes).clamp(1, batch.max(1))
}

/// Words of a buffer whose size follows from the graph and the capacity alone. `None` if the number
/// overflows. Zero for weights, slots and buffers that only cooperative matrices need.
pub(super) fn elements(graph: &Graph, capacity: Capacity, place: Place) -> Option<usize> {
    let Capacity { batch, context, .. } = capacity;
    let pairs = |moe: &Moe| batch.checked_mul(moe.top_k);
    let most = |of: &dyn Fn(&Moe) -> Option<usize>| {
        graph.moe.iter().try_fold(0, |most, moe| Some(of(moe)?.max(most)))
    };
    match place {
        Place::Tokens => Some(batch),
        Place::Activation(buf) => batch.checked_mul(stride(graph.width(buf))),
        Place::Keys(kv) | Place::Values(kv) => {
            let kv = graph.kv_spec(kv);
            let width = kv.kv_heads.checked_mul(kv.head_dim)?;
            let words = match capacity.kv {
                KvFormat::F32 => width,
                KvFormat::F16 => width.div_ceil(2),
            };
            words.checked_mul(kv::blocks(context))?.checked_mul(BLOCK)
        }
        Place::Recurrent(state) => graph.state_spec(state).width.checked_mul(RING),
        Place::RecurrentSlot => Some(4),
        // One word before for the count, and two words behind that kernels may read
        // (kernels/shared/blocks.wgsl).
        Place::BlockTable => Some(kv::blocks(graph.context_max.max(context)) + 3),
        Place::RopeTable(rope) => {
            graph.rope_spec(rope).inv_freq.len().checked_mul(2)?.checked_mul(context)
        }
        Place::Ids(moe) | Place::RoutingWeights(moe) => pairs(graph.moe_spec(moe)),
        Place::PairInner => most(&|moe| pairs(moe)?.checked_mul(stride(moe.ff))),
        Place::PairOutputs => most(&|moe| pairs(moe)?.checked_mul(stride(moe.hidden))),
        Place::PairOrder => most(&pairs),
        Place::PairTiles => {
            most(&|moe| Some((pairs(moe)?.div_ceil(PAIR_TILE) + moe.experts.len()) * 4))
        }
        Place::Logits => logit_rows(graph, batch).checked_mul(graph.result_width()),
        Place::Empty => Some(4),
        Place::Halves
        | Place::Scales
        | Place::Parts
        | Place::Vector(_)
        | Place::RowRange(..)
        | Place::Slots(_)
        | Place::Table(_)
        | Place::Spill(_)
        | Place::Biases(_) => Some(0),
        token => decode::elements(graph, &Layout::of(graph), token),
    }
}

/// An attention layer's cache, `[blocks, BLOCK, kv_heads * head_dim]` each: f32, or pairs of f16
/// with the lower element in a word's low bits.
pub(super) struct KvCache {
    pub keys: wgpu::Buffer,
    pub values: wgpu::Buffer,
}

/// (cos, sin) by position and pair. Angles are in f32, as in the reference implementations.
fn rope_table(rope: &Rope, long: bool, context: usize) -> Vec<f32> {
    let mut table = Vec::with_capacity(context * rope.inv_freq.len() * 2);
    for position in 0..context {
        for freq in rope.form(long) {
            let (sin, cos) = (position as f32 * freq).sin_cos();
            table.push(cos * rope.attention_factor);
            table.push(sin * rope.attention_factor);
        }
    }
    table
}

/// A MoE layer's routing, `[batch, top_k]` each.
pub(super) struct Routing {
    pub ids: wgpu::Buffer,
    pub weights: wgpu::Buffer,
    pub readback: Readback,
}

pub(super) struct Buffers {
    /// [`Step`](super::params::Step), or [`Steps`] of several sequences.
    pub step: wgpu::Buffer,
    pub tokens: wgpu::Buffer,
    activations: Vec<wgpu::Buffer>,
    kv: Vec<KvCache>,
    pub recurrent: Recurrent,
    /// How many elements were clamped in the caches, and the blocks of the sequence that steps.
    pub blocks: wgpu::Buffer,
    /// (cos, sin) by position and pair, in the form that is in use.
    ropes: Vec<wgpu::Buffer>,
    /// The forms for short and for long sequences of ropes that have both.
    forms: Vec<Option<[wgpu::Buffer; 2]>>,
    stretched: bool,
    pub routing: Vec<Routing>,
    /// The gated inner activations of each (token, choice) pair. Shared by the MoE layers.
    pub pair_inner: wgpu::Buffer,
    /// The output of each pair's expert.
    pub pair_outputs: wgpu::Buffer,
    /// The pairs grouped by expert, and their division into tiles. Shared by the MoE layers.
    pub pair_order: wgpu::Buffer,
    pub pair_tiles: wgpu::Buffer,
    /// Rows of activations in f16 and their scales, for cooperative matrices. Every user fills them
    /// again.
    pub halves: wgpu::Buffer,
    pub scales: wgpu::Buffer,
    /// Sums over parts of the columns, for the same.
    pub parts: wgpu::Buffer,
    /// `[logit_rows, vocab]`, unpadded.
    pub logits: wgpu::Buffer,
    pub logit_rows: usize,
    pub logits_readback: Readback,
    /// Stands in for an absent bias.
    pub empty: wgpu::Buffer,
    pub bytes: u64,
}

impl Buffers {
    // Long: one buffer after another.
    pub fn new(device: &GpuDevice, graph: &Graph, capacity: Capacity) -> Result<Self> {
        let mut total = 0;
        let mut make = |what: &str, elements: Option<usize>, usage| {
            let bytes = elements.and_then(|n| n.checked_mul(4)).ok_or_else(|| {
                BackendError::OutOfMemory { what: what.to_owned(), bytes: u64::MAX }
            })?;
            let buffer = device.buffer(what, bytes as u64, usage)?;
            total += buffer.size();
            Ok::<_, BackendError>(buffer)
        };
        let Capacity { batch, context, .. } = capacity;
        let size = |place| elements(graph, capacity, place);
        let activations = (0..)
            .zip(&graph.buffers)
            .map(|(i, b)| {
                let what = format!("activations {:?} for a batch of {batch}", b.name);
                make(&what, size(Place::Activation(Buf(i))), STORAGE)
            })
            .collect::<Result<_>>()?;
        let kv = (0..graph.kv.len() as u16)
            .map(|i| {
                let what = format!("the KV cache of one layer for {context} positions");
                Ok(KvCache {
                    keys: make(&what, size(Place::Keys(KvId(i))), STORAGE)?,
                    values: make(&what, size(Place::Values(KvId(i))), STORAGE)?,
                })
            })
            .collect::<Result<_>>()?;
        let recurrent = Recurrent::new(device, graph)?;
        let (mut ropes, mut forms) = (Vec::new(), Vec::new());
        for (i, rope) in (0..).zip(&graph.ropes) {
            let what = format!("rope table for {context} positions");
            let buffer = make(&what, size(Place::RopeTable(RopeId(i))), STORAGE)?;
            device.write(&buffer, 0, bytemuck::cast_slice(&rope_table(rope, false, context)));
            ropes.push(buffer);
            let mut form = |long| {
                let buffer = make(&what, size(Place::RopeTable(RopeId(i))), STORAGE)?;
                device.write(&buffer, 0, bytemuck::cast_slice(&rope_table(rope, long, context)));
                Ok::<_, BackendError>(buffer)
            };
            forms.push(match rope.long {
                Some(_) => Some([form(false)?, form(true)?]),
                None => None,
            });
        }
        let blocks = make("the table of cache blocks", size(Place::BlockTable), STORAGE)?;
        let identity: Vec<u32> = (0..kv::blocks(context) as u32).collect();
        device.write(&blocks, 4, bytemuck::cast_slice(&identity));
        let mut routing = Vec::new();
        for i in 0..graph.moe.len() as u16 {
            let ids = make("chosen experts", size(Place::Ids(MoeId(i))), STORAGE)?;
            let readback = Readback::new(device, "the chosen experts", ids.size())?;
            let weights = make("routing weights", size(Place::RoutingWeights(MoeId(i))), STORAGE)?;
            routing.push(Routing { ids, weights, readback });
        }
        let inner = size(Place::PairInner);
        let order = size(Place::PairOrder);
        let widest = graph.buffers.iter().map(|b| stride(b.width)).max().unwrap_or(0);
        let (halves, scales, parts) = match device.pipelines().cooperative {
            // Half a word per element of the batch's rows or of the pairs' rows.
            Some(_) => (
                batch.checked_mul(widest).max(inner).map(|n| n.div_ceil(2)),
                order.max(Some(batch)),
                Some(tiles::PARTS_WORDS),
            ),
            None => (Some(0), Some(0), Some(0)),
        };
        let logit_rows = logit_rows(graph, batch);
        let logits = make("logits", size(Place::Logits), STORAGE)?;
        let logits_readback = Readback::new(device, "the logits", logits.size() + 4)?;
        Ok(Self {
            step: make("step", Some(size_of::<Steps>() / 4), UNIFORM)?,
            tokens: make("tokens", size(Place::Tokens), STORAGE)?,
            activations,
            kv,
            blocks,
            ropes,
            forms,
            stretched: false,
            routing,
            pair_inner: make("expert activations", inner, STORAGE)?,
            pair_outputs: make("expert outputs", size(Place::PairOutputs), STORAGE)?,
            pair_order: make("pairs by expert", order, STORAGE)?,
            pair_tiles: make("tiles of pairs", size(Place::PairTiles), STORAGE)?,
            halves: make("halved activations", halves, STORAGE)?,
            scales: make("scales of halved activations", scales, STORAGE)?,
            parts: make("sums over parts of the columns", parts, STORAGE)?,
            logits_readback,
            logits,
            logit_rows,
            empty: make("no bias", size(Place::Empty), STORAGE)?,
            bytes: total + recurrent.bytes(),
            recurrent,
        })
    }

    /// Makes the activations fit another graph that begins with the same ones.
    pub fn adapt(&mut self, device: &GpuDevice, graph: &Graph, capacity: Capacity) -> Result<()> {
        let count = graph.buffers.len();
        let words = |place| {
            elements(graph, capacity, place).and_then(|n| n.checked_mul(4)).ok_or_else(|| {
                let what = "activations of adapters".to_owned();
                BackendError::OutOfMemory { what, bytes: u64::MAX }
            })
        };
        for gone in self.activations.drain(count.min(self.activations.len())..) {
            self.bytes -= gone.size();
        }
        for i in self.activations.len()..count {
            let bytes = words(Place::Activation(Buf(i as u16)))?;
            let buffer = device.buffer("activations of adapters", bytes as u64, STORAGE)?;
            self.bytes += buffer.size();
            self.activations.push(buffer);
        }
        let widest = graph.buffers.iter().map(|b| stride(b.width)).max().unwrap_or(0);
        // Half a word per element.
        let halves = (capacity.batch * widest).div_ceil(2) as u64 * 4;
        if device.pipelines().cooperative.is_some() && self.halves.size() < halves {
            let buffer = device.buffer("halved activations", halves, STORAGE)?;
            self.bytes = self.bytes + buffer.size() - self.halves.size();
            self.halves = buffer;
        }
        Ok(())
    }

    /// Makes room for the context of `capacity`, layer by layer. The caches' contents are kept.
    pub fn grow(&mut self, device: &GpuDevice, graph: &Graph, capacity: Capacity) -> Result<()> {
        let context = capacity.context;
        let what = format!("the KV cache of one layer for {context} positions");
        for (i, kv) in (0..).map(KvId).zip(&mut self.kv) {
            for (of, place) in [(&mut kv.keys, Place::Keys(i)), (&mut kv.values, Place::Values(i))]
            {
                let bytes = elements(graph, capacity, place).and_then(|n| n.checked_mul(4));
                let bytes = bytes.ok_or_else(|| BackendError::OutOfMemory {
                    what: what.clone(),
                    bytes: u64::MAX,
                })?;
                let new = device.buffer(&what, bytes as u64, STORAGE)?;
                let label = Some("a cache moves");
                let mut encoder =
                    device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
                let kept = of.size().min(new.size());
                encoder.copy_buffer_to_buffer(of, 0, &new, 0, Some(kept));
                device.submit(encoder)?;
                self.bytes = self.bytes + new.size() - of.size();
                *of = new;
            }
            // The old buffers are freed before the next layer's are made.
            device.flush()?;
        }
        let stretched = self.stretched;
        for ((rope, of), forms) in graph.ropes.iter().zip(&mut self.ropes).zip(&mut self.forms) {
            let what = format!("rope table for {context} positions");
            let forms = forms.iter_mut().flatten().zip([false, true]);
            for (of, long) in [(of, stretched)].into_iter().chain(forms) {
                let table = rope_table(rope, long, context);
                let new = device.buffer(&what, table.len() as u64 * 4, STORAGE)?;
                device.write(&new, 0, bytemuck::cast_slice(&table));
                self.bytes = self.bytes + new.size() - of.size();
                *of = new;
            }
        }
        Ok(())
    }

    /// Puts ropes into the form for long sequences, or for others, after everything submitted so far.
    pub fn stretch(&mut self, device: &GpuDevice, long: bool) -> Result<()> {
        if self.stretched == long {
            return Ok(());
        }
        let label = Some("ropes change their form");
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        for (to, forms) in self.ropes.iter().zip(&self.forms) {
            let Some(forms) = forms else { continue };
            let from = &forms[usize::from(long)];
            encoder.copy_buffer_to_buffer(from, 0, to, 0, Some(from.size()));
        }
        device.submit(encoder)?;
        self.stretched = long;
        Ok(())
    }

    pub fn activation(&self, buf: Buf) -> &wgpu::Buffer {
        &self.activations[usize::from(buf.0)]
    }

    pub fn kv(&self, id: KvId) -> &KvCache {
        &self.kv[usize::from(id.0)]
    }

    pub fn rope(&self, id: RopeId) -> &wgpu::Buffer {
        &self.ropes[usize::from(id.0)]
    }

    pub fn routing(&self, id: MoeId) -> &Routing {
        &self.routing[usize::from(id.0)]
    }
}
