//! Experts that lost their slots, kept in host memory in the device's format, so that the device
//! brings them back by itself: no bytes pass through the CPU.
//!
//! An expert is copied out of its slot when it is first evicted, and copied into a slot when it is
//! needed again. It stays here until the room is needed. Copies out, and copies in that the host
//! asks for, are recorded in order and go first in the next submission ([`Spill::encode`]). A fused
//! token fetches the experts that it misses while it runs (kernels/decode_fetch.wgsl): each layer's
//! area is one buffer, and the device knows where each expert is in it. Within a layer the least
//! recently used expert is dropped first.
//!
//! Only for adapters with memory of their own that can read the host's. Buffers that can be mapped
//! for reading are in host memory, whoever reads them.

use std::collections::HashMap;

use lru::LruCache;
use wgpu::{Buffer, BufferUsages, CommandEncoder, Features};

use super::device::GpuDevice;
use super::experts::Experts;
use crate::backend::Slot;
use crate::graph::{Graph, MoeId};

/// The feature that the adapter must have.
pub(super) const FEATURE: Features = Features::MAPPABLE_PRIMARY_BUFFERS;
/// The usage of buffers in host memory.
pub(super) const USAGE: BufferUsages = BufferUsages::MAP_READ
    .union(BufferUsages::COPY_DST)
    .union(BufferUsages::COPY_SRC)
    .union(BufferUsages::STORAGE);
/// The most copies that are recorded before they must be submitted.
const COPIES_MAX: usize = 4096;

type Key = (MoeId, u32);

/// One layer's memory.
struct Area {
    /// Allocated when the first expert comes.
    buffer: Option<Buffer>,
    /// How many experts fit, and the bytes of each.
    count: u32,
    bytes: u64,
    free: Vec<u32>,
    /// The place of each expert.
    held: LruCache<u32, u32>,
}

/// An offset in a buffer.
struct BufferOffset {
    buffer: Buffer,
    offset: u64,
}

struct Copy {
    from: BufferOffset,
    to: BufferOffset,
    bytes: u64,
}

/// The areas of one backend.
pub(super) struct Spill {
    /// By MoE layer.
    areas: Vec<Area>,
    /// The slot of each expert that has one.
    slots: HashMap<Key, Slot>,
    copies: Vec<Copy>,
    /// The experts that were put into a place or dropped since the last call of [`Self::moves`].
    moves: Vec<(MoeId, u32, Option<u32>)>,
    /// Whether areas were allocated since the last call of [`Self::has_grown`].
    grown: bool,
}

impl Spill {
    /// Areas of at most `bytes` in total, divided in proportion to the size of each layer's
    /// experts. `None` if there are no experts or the adapter has no use for areas.
    pub fn new(device: &GpuDevice, graph: &Graph, experts: &Experts, bytes: u64) -> Option<Self> {
        if !device.spills() {
            return None;
        }
        let layers = || (0..).map(MoeId).zip(&graph.moe);
        let each = |moe| experts.slot_bytes(moe).unwrap_or(0);
        let all: u64 = layers().map(|(moe, spec)| each(moe) * spec.experts.len() as u64).sum();
        let share = bytes as f64 / all.max(1) as f64;
        let areas: Vec<Area> = layers()
            .map(|(moe, spec)| {
                let bytes = each(moe);
                let wanted = spec.experts.len() as f64 * share.min(1.0);
                let within = device.binding_bytes_max().checked_div(bytes).unwrap_or(0);
                let count = (wanted as u64).min(within) as u32;
                let free = (0..count).rev().collect();
                Area { buffer: None, count, bytes, free, held: LruCache::unbounded() }
            })
            .collect();
        areas.iter().any(|area| area.count > 0).then(|| Self {
            areas,
            slots: HashMap::new(),
            copies: Vec::new(),
            moves: Vec::new(),
            grown: false,
        })
    }

    /// A layer's area, if it has been allocated.
    pub fn area(&self, moe: MoeId) -> Option<&Buffer> {
        self.areas.get(usize::from(moe.0))?.buffer.as_ref()
    }

    /// The experts that were put into a place or dropped since the last call.
    pub fn moves(&mut self) -> impl Iterator<Item = (MoeId, u32, Option<u32>)> {
        self.moves.drain(..)
    }

    /// Whether an area was allocated since the last call.
    pub const fn has_grown(&mut self) -> bool {
        std::mem::replace(&mut self.grown, false)
    }

    /// Call when an expert is in a slot.
    pub fn entered(&mut self, moe: MoeId, expert: u32, slot: Slot) {
        self.slots.insert((moe, expert), slot);
        if let Some(area) = self.areas.get_mut(usize::from(moe.0)) {
            area.held.promote(&expert);
        }
    }

    /// Call when an expert loses its slot, which is at `offset` of `buffer`. It is set aside,
    /// unless it is here already or there is no room at all.
    pub fn left(
        &mut self,
        device: &GpuDevice,
        (moe, expert): Key,
        locate: impl FnOnce(Slot) -> Option<(Buffer, u64, u64)>,
    ) {
        let Some(slot) = self.slots.remove(&(moe, expert)) else { return };
        let Some(area) = self.areas.get_mut(usize::from(moe.0)) else { return };
        if area.held.contains(&expert) || self.copies.len() >= COPIES_MAX {
            return;
        }
        let Some((buffer, offset, bytes)) = locate(slot) else { return };
        if area.buffer.is_none() && area.count > 0 {
            match device.buffer("experts in host memory", area.room(), USAGE) {
                Ok(made) => {
                    area.buffer = Some(made);
                    self.grown = true;
                }
                // Continues with the areas that exist.
                Err(error) => {
                    tracing::info!("no more host memory for experts: {error}");
                    area.count = 0;
                }
            }
        }
        let Some(to) = area.buffer.clone() else { return };
        let place = match (area.free.pop(), area.held.peek_lru()) {
            (Some(place), _) => place,
            (None, Some((gone, place))) => {
                let (gone, place) = (*gone, *place);
                area.held.pop(&gone);
                self.moves.push((moe, gone, None));
                place
            }
            (None, None) => return,
        };
        area.held.put(expert, place);
        self.moves.push((moe, expert, Some(place)));
        let to = BufferOffset { buffer: to, offset: area.bytes * u64::from(place) };
        self.copies.push(Copy { from: BufferOffset { buffer, offset }, to, bytes });
    }

    /// Records the copy of an expert into a slot, `bytes` at `offset` of `buffer`. `false` if it is
    /// not here.
    pub fn bring(
        &mut self,
        (moe, expert): Key,
        (buffer, offset, bytes): (Buffer, u64, u64),
    ) -> bool {
        let Some(area) = self.areas.get_mut(usize::from(moe.0)) else { return false };
        let (Some(from), Some(place)) = (area.buffer.clone(), area.held.get(&expert)) else {
            return false;
        };
        if self.copies.len() >= COPIES_MAX {
            return false;
        }
        let from = BufferOffset { buffer: from, offset: area.bytes * u64::from(*place) };
        self.copies.push(Copy { from, to: BufferOffset { buffer, offset }, bytes });
        true
    }

    /// Whether copies are waiting for a submission.
    pub fn waits(&self) -> bool {
        !self.copies.is_empty()
    }

    /// Encodes the copies recorded so far, in order.
    pub fn encode(&mut self, encoder: &mut CommandEncoder) {
        for Copy { from, to, bytes } in self.copies.drain(..) {
            let BufferOffset { buffer, offset } = &from;
            encoder.copy_buffer_to_buffer(buffer, *offset, &to.buffer, to.offset, Some(bytes));
        }
    }
}

impl Area {
    /// The area's size in bytes.
    fn room(&self) -> u64 {
        self.bytes * u64::from(self.count)
    }
}
