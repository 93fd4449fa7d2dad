//! What the decode kernels keep between dispatches: packed activations, one token's
//! queries, the splits of its attention, its routing, the table of experts' slots
//! and the state that says whether the step was halted.

use wgpu::BufferUsages;

use super::fuse::{FeedForward, Fused};
use super::params::packed_bytes;
use crate::backend::{BackendError, Result, Slot};
use crate::gpu::device::GpuDevice;
use crate::gpu::experts::EMPTY;
use crate::graph::{Graph, MoeId};

/// Splits of one token's attention at most (kernels/shared/splits.wgsl).
pub(in crate::gpu) const SPLITS_MAX: u32 = 64;

/// Slots of one class offered to the device at most.
const OFFERED_MAX: usize = 256;

/// Words of the state before the chosen experts: the layer that halted (from 1), the
/// chosen token, two spare.
pub(in crate::gpu) const STATE_HEAD: usize = 4;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

pub(in crate::gpu) struct DecodeBuffers {
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
    /// By choice: (place in memory of the host, slot).
    pub fetches: wgpu::Buffer,
    pub table: Table,
    /// By MoE layer: where its choices begin in the state, words.
    pub ids_at: Vec<usize>,
    /// Where the state says who took of the slots offered, and then, by class, how many.
    pub taker_at: usize,
    pub state_words: usize,
    pub bytes: u64,
}

/// What the device looks experts up in; the host's copy and the device's.
pub(in crate::gpu) struct Table {
    pub buffer: wgpu::Buffer,
    /// By MoE layer and expert: the slot, or [`EMPTY`].
    slots: Words,
    /// By MoE layer and expert: the place in the layer's memory of the host, or [`EMPTY`].
    shelf: Words,
    /// By class: how many slots are offered, then which.
    offers: Words,
    /// By MoE layer: where its row begins in `slots` and in `shelf`.
    rows: Vec<usize>,
}

/// A stretch of the table.
struct Words {
    /// Where it begins.
    at: usize,
    words: Vec<u32>,
    /// What the device has not been told of.
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
        // There are no more classes than layers.
        let taker_at = state_words;
        state_words += 1 + graph.moe.len();
        let mut rows = Vec::new();
        let mut entries = 0;
        for count in experts.clone() {
            rows.push(entries);
            entries += count;
        }
        let slots = Words::new(0, entries, EMPTY);
        let shelf = Words::new(slots.end(), entries, EMPTY);
        let offers = Words::new(shelf.end(), graph.moe.len() * (1 + OFFERED_MAX), 0);
        let table = make("the experts' places", offers.end() * 4)?;
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
            fetches: make("experts to be fetched", top_k * 8)?,
            table: Table { buffer: table, slots, shelf, offers, rows },
            ids_at,
            taker_at,
            state_words,
            bytes: total,
        })
    }
}

impl Table {
    /// Where a layer's slots begin.
    pub fn row(&self, moe: MoeId) -> usize {
        self.rows[usize::from(moe.0)]
    }

    /// Where a layer's places in memory of the host begin.
    pub fn shelf_row(&self, moe: MoeId) -> usize {
        self.shelf.at + self.row(moe)
    }

    /// Where a class's offer begins.
    pub const fn offer_at(&self, class: u16) -> usize {
        self.offers.at + class as usize * (1 + OFFERED_MAX)
    }

    /// From the next flush on.
    pub fn place(&mut self, moe: MoeId, expert: u32, slot: Option<Slot>) {
        let at = self.row(moe) + expert as usize;
        self.slots.set(at, slot.map_or(EMPTY, |slot| slot.index));
    }

    /// Whether the device knows an expert to be in a slot.
    pub fn places(&self, moe: MoeId, expert: u32) -> bool {
        self.slots.words[self.row(moe) + expert as usize] != EMPTY
    }

    /// Where in the layer's memory of the host an expert lies, from the next flush on.
    pub fn shelve(&mut self, moe: MoeId, expert: u32, place: Option<u32>) {
        self.shelf.set(self.row(moe) + expert as usize, place.unwrap_or(EMPTY));
    }

    /// Slots that the device may fill, from the next flush on; what was offered before is not any more.
    pub fn offer(&mut self, free: &[Slot]) {
        let mut counts = vec![0; self.rows.len()];
        for slot in free {
            let class = usize::from(slot.class);
            let Some(count) = counts.get_mut(class).filter(|count| **count < OFFERED_MAX) else {
                continue;
            };
            *count += 1;
            self.offers.set(class * (1 + OFFERED_MAX) + *count, slot.index);
        }
        for (class, count) in counts.into_iter().enumerate() {
            self.offers.set(class * (1 + OFFERED_MAX), count as u32);
        }
    }

    /// The slots offered of a class, in the order in which they are taken.
    pub fn offered(&self, class: u16) -> &[u32] {
        let at = usize::from(class) * (1 + OFFERED_MAX);
        let count = self.offers.words.get(at).map_or(0, |count| *count as usize);
        self.offers.words.get(at + 1..at + 1 + count).unwrap_or_default()
    }

    /// Writes what changed, before anything submitted later.
    pub fn flush(&mut self, device: &GpuDevice) {
        for words in [&mut self.slots, &mut self.shelf, &mut self.offers] {
            let dirty = std::mem::take(&mut words.dirty);
            if !dirty.is_empty() {
                let bytes = bytemuck::cast_slice(&words.words[dirty.clone()]);
                device.write(&self.buffer, (words.at + dirty.start) as u64 * 4, bytes);
            }
        }
    }
}

impl Words {
    fn new(at: usize, count: usize, value: u32) -> Self {
        Self { at, words: vec![value; count], dirty: 0..count }
    }

    const fn end(&self) -> usize {
        self.at + self.words.len()
    }

    fn set(&mut self, at: usize, value: u32) {
        if std::mem::replace(&mut self.words[at], value) == value {
            return;
        }
        self.dirty = match self.dirty.is_empty() {
            true => at..at + 1,
            false => self.dirty.start.min(at)..self.dirty.end.max(at + 1),
        };
    }
}
