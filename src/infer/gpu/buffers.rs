//! The activations, caches and tables of one backend: everything whose size
//! follows from the graph and the capacity, allocated once.
//!
//! A row of activations is padded with zeros to whole units of 32 f32, so that
//! kernels never look at where a row ends. Nothing ever writes the padding.

use wgpu::BufferUsages;

use super::device::GpuDevice;
use super::params::Step;
use super::readback::Readback;
use super::repack::UNIT;
use crate::infer::backend::{BackendError, Capacity, KvFormat, Result};
use crate::infer::graph::{Buf, Graph, KvId, MoeId, RopeId};

/// Pairs of one tile, shared/pairs.wgsl.
pub(super) const PAIR_TILE: usize = 64;

/// Device memory for one piece of a batch's logits, at most (but at least one row).
const LOGITS_BYTES_MAX: usize = 16 << 20;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);
const UNIFORM: BufferUsages = BufferUsages::UNIFORM.union(BufferUsages::COPY_DST);

/// f32s from one row of a buffer of this width to the next.
pub(super) const fn stride(width: usize) -> usize {
    width.next_multiple_of(UNIT)
}

/// An attention layer's cache, `[context, kv_heads * head_dim]` each: f32, or f16 in pairs,
/// the lower element in a word's low bits.
pub(super) struct KvCache {
    pub keys: wgpu::Buffer,
    pub values: wgpu::Buffer,
}

/// A MoE layer's routing, `[batch, top_k]` each.
pub(super) struct Routing {
    pub ids: wgpu::Buffer,
    pub shares: wgpu::Buffer,
    pub readback: Readback,
}

pub(super) struct Buffers {
    /// [`Step`]
    pub step: wgpu::Buffer,
    pub tokens: wgpu::Buffer,
    activations: Vec<wgpu::Buffer>,
    kv: Vec<KvCache>,
    /// (cos, sin) by position and pair.
    ropes: Vec<wgpu::Buffer>,
    pub routing: Vec<Routing>,
    /// The gated inner activations of each (token, choice) pair; shared by the MoE layers.
    pub pair_inner: wgpu::Buffer,
    /// The output of each pair's expert.
    pub pair_outputs: wgpu::Buffer,
    /// The pairs by expert, and the tiles they are cut into; shared by the MoE layers.
    pub pair_order: wgpu::Buffer,
    pub pair_tiles: wgpu::Buffer,
    /// Rows of activations in f16 and their scales, for cooperative matrices; whoever needs
    /// them fills them anew.
    pub halves: wgpu::Buffer,
    pub scales: wgpu::Buffer,
    /// `[logit_rows, vocab]`, unpadded.
    pub logits: wgpu::Buffer,
    pub logit_rows: usize,
    pub logits_readback: Readback,
    /// Stands in for an absent bias.
    pub empty: wgpu::Buffer,
    pub bytes: u64,
}

impl Buffers {
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
        let activations = graph
            .buffers
            .iter()
            .map(|b| {
                let what = format!("activations {:?} for a batch of {batch}", b.name);
                make(&what, batch.checked_mul(stride(b.width)), STORAGE)
            })
            .collect::<Result<_>>()?;
        let kv = graph
            .kv
            .iter()
            .map(|kv| {
                let what = format!("the KV cache of one layer for {context} positions");
                let width = kv.kv_heads.checked_mul(kv.head_dim).map(|width| match capacity.kv {
                    KvFormat::F32 => width,
                    KvFormat::F16 => width.div_ceil(2),
                });
                let elements = width.and_then(|width| width.checked_mul(context));
                Ok(KvCache {
                    keys: make(&what, elements, STORAGE)?,
                    values: make(&what, elements, STORAGE)?,
                })
            })
            .collect::<Result<_>>()?;
        let mut ropes = Vec::new();
        for rope in &graph.ropes {
            let what = format!("rotary table for {context} positions");
            let elements = rope.inv_freq.len().checked_mul(2).and_then(|n| n.checked_mul(context));
            let buffer = make(&what, elements, STORAGE)?;
            // Angles in f32, as the reference implementations have them.
            let mut turns: Vec<f32> = Vec::with_capacity(elements.unwrap_or(0));
            for position in 0..context {
                for freq in &rope.inv_freq {
                    let (sin, cos) = (position as f32 * freq).sin_cos();
                    turns.push(cos * rope.attention_factor);
                    turns.push(sin * rope.attention_factor);
                }
            }
            device.write(&buffer, 0, bytemuck::cast_slice(&turns));
            ropes.push(buffer);
        }
        let mut routing = Vec::new();
        let (mut inner, mut outputs) = (Some(0), Some(0));
        let (mut order, mut tiles) = (Some(0), Some(0));
        for moe in &graph.moe {
            let pairs = batch.checked_mul(moe.top_k);
            let most =
                |a: Option<usize>, width: usize| Some(a?.max(pairs?.checked_mul(stride(width))?));
            inner = most(inner, moe.ff);
            outputs = most(outputs, moe.hidden);
            order = order.max(pairs);
            tiles = tiles.max(pairs.map(|n| (n.div_ceil(PAIR_TILE) + moe.experts.len()) * 4));
            let ids = make("chosen experts", pairs, STORAGE)?;
            let readback = Readback::new(device, "the chosen experts", ids.size())?;
            routing.push(Routing {
                ids,
                shares: make("expert weights", pairs, STORAGE)?,
                readback,
            });
        }
        let widest = graph.buffers.iter().map(|b| stride(b.width)).max().unwrap_or(0);
        let (halves, scales) = match device.pipelines().cooperative {
            // Half a word an element: of the batch's rows, or of the pairs'.
            Some(_) => (
                batch.checked_mul(widest).max(inner).map(|n| n.div_ceil(2)),
                order.max(Some(batch)),
            ),
            None => (Some(0), Some(0)),
        };
        let row_bytes = graph.vocab.max(1).saturating_mul(4);
        let logit_rows = (LOGITS_BYTES_MAX / row_bytes).clamp(1, batch.max(1));
        let logits = make("logits", logit_rows.checked_mul(graph.vocab), STORAGE)?;
        Ok(Self {
            step: make("step", Some(size_of::<Step>() / 4), UNIFORM)?,
            tokens: make("tokens", Some(batch), STORAGE)?,
            activations,
            kv,
            ropes,
            routing,
            pair_inner: make("expert activations", inner, STORAGE)?,
            pair_outputs: make("expert outputs", outputs, STORAGE)?,
            pair_order: make("pairs by expert", order, STORAGE)?,
            pair_tiles: make("tiles of pairs", tiles, STORAGE)?,
            halves: make("halved activations", halves, STORAGE)?,
            scales: make("scales of halved activations", scales, STORAGE)?,
            logits_readback: Readback::new(device, "the logits", logits.size())?,
            logits,
            logit_rows,
            empty: make("no bias", Some(4), STORAGE)?,
            bytes: total,
        })
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
