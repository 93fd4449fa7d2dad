//! What the decode kernels keep between dispatches: packed activations, one token's
//! queries, the splits of its attention, its routing, the table of experts' slots
//! and the state that says whether the step was halted.

use wgpu::BufferUsages;

use super::fuse::{FeedForward, Fused};
use super::params::packed_bytes;
use crate::infer::backend::{BackendError, Result, Slot};
use crate::infer::gpu::device::GpuDevice;
use crate::infer::gpu::experts::EMPTY;
use crate::infer::graph::{Graph, MoeId};

/// Splits of one token's attention at most (kernels/shared/splits.wgsl).
pub(in crate::infer::gpu) const SPLITS_MAX: u32 = 64;

/// Words of the state before the chosen experts: the layer that halted (from 1), the
/// chosen token, two spare.
pub(in crate::infer::gpu) const STATE_HEAD: usize = 4;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

pub(in crate::infer::gpu) struct DecodeBuffers {
    /// Packed: the normalised stream, the attended values, the gated inner activations.
    pub normed: wgpu::Buffer,
    pub attended: wgpu::Buffer,
    pub inner: wgpu::Buffer,
    /// f32: queries, keys and values as they come; the splits; router logits.
    pub qkv: wgpu::Buffer,
    pub partial: wgpu::Buffer,
    pub router: wgpu::Buffer,
    /// By choice: (slot, share).
    pub routed: wgpu::Buffer,
    /// The residual stream of the layer that halted.
    pub aside: wgpu::Buffer,
    pub state: wgpu::Buffer,
    pub table: Table,
    /// By MoE layer: where its choices begin in the state, words.
    pub ids_at: Vec<usize>,
    pub state_words: usize,
    pub bytes: u64,
}

/// By MoE layer and expert: the slot, or [`EMPTY`]; the host's copy and the device's.
pub(in crate::infer::gpu) struct Table {
    pub buffer: wgpu::Buffer,
    slots: Vec<u32>,
    /// By MoE layer: where its row begins.
    rows: Vec<usize>,
    /// Entries that the device has not been told of.
    dirty: std::ops::Range<usize>,
}

impl DecodeBuffers {
    pub fn new(device: &GpuDevice, graph: &Graph, fused: &Fused) -> Result<Self> {
        let mut total = 0;
        let mut make = |what: &str, bytes: usize| {
            let buffer = device.buffer(what, bytes as u64, STORAGE)?;
            total += buffer.size();
            Ok::<_, BackendError>(buffer)
        };
        let hidden = graph.width(fused.x);
        let most = |of: &dyn Fn(&super::fuse::Layer) -> usize| {
            fused.layers.iter().map(of).max().unwrap_or(0)
        };
        let heads = most(&|l| l.heads * l.head_dim);
        let qkv = most(&|l| (l.heads + 2 * l.kv_heads) * l.head_dim);
        let partial = most(&|l| l.heads * (l.head_dim + 4) * SPLITS_MAX as usize);
        let inner = most(&|l| match l.ff {
            FeedForward::Dense { gate, .. } => packed_bytes(graph.weight_spec(gate).rows),
            FeedForward::Experts { moe, .. } => {
                let spec = graph.moe_spec(moe);
                spec.top_k * packed_bytes(spec.ff)
            }
        });
        let experts = graph.moe.iter().map(|moe| moe.experts.len());
        let top_k = graph.moe.iter().map(|moe| moe.top_k).max().unwrap_or(0);
        let mut ids_at = Vec::new();
        let mut state_words = STATE_HEAD;
        for moe in &graph.moe {
            ids_at.push(state_words);
            state_words += moe.top_k;
        }
        let mut rows = Vec::new();
        let mut entries = 0;
        for count in experts.clone() {
            rows.push(entries);
            entries += count;
        }
        let table = make("the experts' places", entries * 4)?;
        Ok(Self {
            normed: make("packed activations", packed_bytes(hidden))?,
            attended: make("packed attention", packed_bytes(heads))?,
            inner: make("packed inner activations", inner)?,
            qkv: make("queries, keys and values", qkv * 4)?,
            partial: make("split attention", partial * 4)?,
            router: make("router logits", experts.max().unwrap_or(0) * 4)?,
            routed: make("a layer's choices", top_k * 8)?,
            aside: make("the residual set aside", hidden.next_multiple_of(4) * 4)?,
            state: make("the step's state", state_words * 4)?,
            table: Table { buffer: table, slots: vec![EMPTY; entries], rows, dirty: 0..entries },
            ids_at,
            state_words,
            bytes: total,
        })
    }
}

impl Table {
    pub fn row(&self, moe: MoeId) -> usize {
        self.rows[usize::from(moe.0)]
    }

    /// From the next flush on.
    pub fn place(&mut self, moe: MoeId, expert: u32, slot: Option<Slot>) {
        let at = self.row(moe) + expert as usize;
        self.slots[at] = slot.map_or(EMPTY, |slot| slot.index);
        self.dirty = match self.dirty.is_empty() {
            true => at..at + 1,
            false => self.dirty.start.min(at)..self.dirty.end.max(at + 1),
        };
    }

    /// Writes what changed, before anything submitted later.
    pub fn flush(&mut self, device: &GpuDevice) {
        let dirty = std::mem::take(&mut self.dirty);
        if !dirty.is_empty() {
            let bytes = bytemuck::cast_slice(&self.slots[dirty.clone()]);
            device.write(&self.buffer, dirty.start as u64 * 4, bytes);
        }
    }
}
