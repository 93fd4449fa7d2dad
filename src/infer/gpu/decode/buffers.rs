//! The buffers that the decode kernels share: packed activations, one token's queries, the splits
//! of its attention, its routing, the table of experts' slots, and the state that says whether the
//! step was halted.

use std::collections::BTreeMap;

use wgpu::BufferUsages;

use super::layout::{Layout, OFFERED_MAX};
use super::rewrites::{moves, splits_max};
use super::token::aside_words;
use crate::backend::{Result, Slot};
use crate::cpu::pack::packed_words;
use crate::gpu::buffers::stride;
use crate::gpu::device::GpuDevice;
use crate::gpu::experts::EMPTY;
use crate::gpu::lower::Place;
use crate::graph::{Buf, Graph, Kv, MoeId, Op};

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

/// Words of a buffer that only tokens as one submission need. `None` for all others.
pub(in crate::gpu) fn elements(graph: &Graph, layout: &Layout, place: Place) -> Option<usize> {
    let attentions = || {
        graph.ops.iter().filter_map(|op| match *op {
            Op::Attention { kv, heads, .. } | Op::AttendSinks { kv, heads, .. } => {
                Some((heads, graph.kv_spec(kv)))
            }
            _ => None,
        })
    };
    let top_k = graph.moe.iter().map(|moe| moe.top_k).max().unwrap_or(0);
    let words = match place {
        Place::Packed(buf) => packed_words(graph.width(buf)),
        Place::Moved(buf) => stride(graph.width(buf)),
        Place::Qkv => {
            let width = |(heads, kv): (usize, Kv)| heads + 2 * kv.kv_heads;
            attentions().map(|of| width(of) * of.1.head_dim).max().unwrap_or(0)
        }
        Place::Partial => {
            let words = |(heads, kv): (usize, Kv)| {
                heads * (kv.head_dim + 4) * splits_max(heads, kv.kv_heads)
            };
            attentions().map(words).max().unwrap_or(0)
        }
        Place::PackedInner => {
            graph.moe.iter().map(|moe| moe.top_k * packed_words(moe.ff)).max().unwrap_or(0)
        }
        Place::Routed | Place::Fetches => 2 * top_k,
        Place::Aside => aside_words(graph),
        Place::State => layout.state_words,
        Place::ExpertPlaces => layout.table_words,
        _ => return None,
    };
    Some(words)
}

/// The rows that have another place.
pub(super) fn moved(graph: &Graph) -> impl Iterator<Item = Place> {
    let bufs = (0..).map(Buf).take(graph.buffers.len());
    bufs.filter(|buf| moves(graph, *buf)).map(Place::Moved)
}

pub(in crate::gpu) struct DecodeBuffers {
    made: BTreeMap<Place, wgpu::Buffer>,
    pub layout: Layout,
    pub table: Table,
    pub bytes: u64,
}

/// The table in which the device looks up experts: the host's copy and the device's.
pub(in crate::gpu) struct Table {
    buffer: wgpu::Buffer,
    layout: Layout,
    /// By MoE layer and expert, the slot or [`EMPTY`].
    slots: Words,
    /// By MoE layer and expert, the place in the layer's host memory or [`EMPTY`].
    spill: Words,
    /// By class, the number of offered slots, then the slots.
    offers: Words,
}

/// A part of the table.
struct Words {
    /// Where it begins.
    at: usize,
    words: Vec<u32>,
    /// The words that the device does not have yet.
    dirty: std::ops::Range<usize>,
}

impl DecodeBuffers {
    pub fn new(device: &GpuDevice, graph: &Graph) -> Result<Self> {
        let layout = Layout::of(graph);
        let packed = (0..).map(|i| Place::Packed(Buf(i))).take(graph.buffers.len());
        let moved = moved(graph).map(|place| (place, "moved activations"));
        let shared = [
            (Place::Qkv, "queries, keys and values"),
            (Place::Partial, "split attention"),
            (Place::PackedInner, "packed inner activations"),
            (Place::Routed, "a layer's choices"),
            (Place::Fetches, "experts to be fetched"),
            (Place::Aside, "what is set aside"),
            (Place::State, "the step's state"),
            (Place::ExpertPlaces, "the experts' places"),
        ];
        let packed = packed.map(|place| (place, "packed activations"));
        let (mut made, mut bytes) = (BTreeMap::new(), 0);
        for (place, what) in packed.chain(moved).chain(shared) {
            let words = elements(graph, &layout, place).unwrap_or(0);
            let buffer = device.buffer(what, words as u64 * 4, STORAGE)?;
            bytes += buffer.size();
            made.insert(place, buffer);
        }
        let entries = layout.entries;
        let table = Table {
            buffer: made[&Place::ExpertPlaces].clone(),
            slots: Words::new(0, entries, EMPTY),
            spill: Words::new(entries, entries, EMPTY),
            offers: Words::new(2 * entries, layout.table_words - 2 * entries, 0),
            layout: layout.clone(),
        };
        Ok(Self { made, layout, table, bytes })
    }

    /// Makes the buffers whose sizes follow from a graph's activations fit another graph with the
    /// same experts.
    pub fn adapt(&mut self, device: &GpuDevice, graph: &Graph) -> Result<()> {
        let packed = (0..).map(|i| Place::Packed(Buf(i))).take(graph.buffers.len());
        let wanted: Vec<Place> = packed.chain(moved(graph)).chain([Place::Aside]).collect();
        let by_graph = |place: &Place| matches!(place, Place::Packed(_) | Place::Moved(_));
        let fits = |place: &Place| !by_graph(place) || wanted.contains(place);
        self.made.retain(|place, _| fits(place));
        for place in wanted {
            let bytes = elements(graph, &self.layout, place).unwrap_or(0) as u64 * 4;
            let have = self.made.get(&place).map_or(0, wgpu::Buffer::size);
            // Buffers are a little larger than what they are made for, at most by 16 bytes.
            if have < bytes || have > bytes + 16 {
                let buffer = device.buffer("packed activations", bytes, STORAGE)?;
                self.made.insert(place, buffer);
            }
        }
        self.bytes = self.made.values().map(wgpu::Buffer::size).sum();
        Ok(())
    }

    /// The buffer of a place that belongs to this path.
    pub fn get(&self, place: Place) -> Option<&wgpu::Buffer> {
        self.made.get(&place)
    }

    pub fn state(&self) -> &wgpu::Buffer {
        &self.made[&Place::State]
    }

    pub fn aside(&self) -> &wgpu::Buffer {
        &self.made[&Place::Aside]
    }
}

impl Table {
    /// Sets an expert's slot, from the next flush on.
    pub fn place(&mut self, moe: MoeId, expert: u32, slot: Option<Slot>) {
        let at = self.layout.row(moe) + expert as usize;
        self.slots.set(at, slot.map_or(EMPTY, |slot| slot.index));
    }

    /// Whether the device knows a slot of this expert.
    pub fn places(&self, moe: MoeId, expert: u32) -> bool {
        self.slots.words[self.layout.row(moe) + expert as usize] != EMPTY
    }

    /// Sets an expert's place in the layer's host memory, from the next flush on.
    pub fn shelve(&mut self, moe: MoeId, expert: u32, place: Option<u32>) {
        self.spill.set(self.layout.row(moe) + expert as usize, place.unwrap_or(EMPTY));
    }

    /// Offers slots that the device may fill, from the next flush on. They replace earlier offers.
    pub fn offer(&mut self, free: &[Slot]) {
        let mut counts = vec![0; self.layout.rows.len()];
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

    /// The offered slots of a class, in the order in which they are taken.
    pub fn offered(&self, class: u16) -> &[u32] {
        let at = usize::from(class) * (1 + OFFERED_MAX);
        let count = self.offers.words.get(at).map_or(0, |count| *count as usize);
        self.offers.words.get(at + 1..at + 1 + count).unwrap_or_default()
    }

    /// Writes what changed, before anything that is submitted later.
    pub fn flush(&mut self, device: &GpuDevice) {
        for words in [&mut self.slots, &mut self.spill, &mut self.offers] {
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
