//! Experts that lost their slots, kept in memory of the host as the device wants them, so
//! that the device brings them back by itself: no bytes pass through the CPU.
//!
//! An expert is copied out of its slot when it is evicted for the first time, and is copied
//! into a slot when it is wanted again; it stays here until the room is needed. Copies are recorded
//! in order and go out at the head of the next submission ([`Spill::encode`]).
//! Within each class of slots the expert that was here longest unused gives way.
//!
//! Only for adapters with memory of their own that can read the host's: buffers that may be
//! mapped for reading lie in the host's memory, whoever reads them.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use lru::LruCache;
use wgpu::{Buffer, BufferUsages, CommandEncoder, Features};

use super::device::GpuDevice;
use crate::infer::backend::Slot;
use crate::infer::graph::MoeId;

/// What the adapter must offer.
pub(super) const FEATURE: Features = Features::MAPPABLE_PRIMARY_BUFFERS;
/// Of buffers in memory of the host.
pub(super) const USAGE: BufferUsages =
    BufferUsages::MAP_READ.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);
/// Room is taken in buffers of about this size.
const CHUNK_BYTES: u64 = 256 << 20;
/// Copies recorded at most before they are to be submitted.
const COPIES_MAX: usize = 4096;

type Key = (MoeId, u32);

/// Where an expert lies in memory of the host.
#[derive(Clone)]
struct Place {
    buffer: Buffer,
    offset: u64,
}

/// Places of one size, and the experts in them.
struct Class {
    free: Vec<Place>,
    held: LruCache<Key, Place>,
}

struct Copy {
    from: Place,
    to: Place,
    bytes: u64,
}

/// The area of one backend.
pub(super) struct Spill {
    classes: HashMap<u16, Class>,
    /// Who is in which slot.
    slots: HashMap<Key, Slot>,
    copies: Vec<Copy>,
    /// Bytes that may still be allocated.
    left: u64,
}

impl Spill {
    /// An area of at most `bytes`; `None` if there are none, or the adapter has no use for it.
    pub fn new(device: &GpuDevice, bytes: u64) -> Option<Self> {
        (bytes > 0 && device.spills()).then(|| Self {
            classes: HashMap::new(),
            slots: HashMap::new(),
            copies: Vec::new(),
            left: bytes,
        })
    }

    /// An expert is in a slot now.
    pub fn entered(&mut self, moe: MoeId, expert: u32, slot: Slot) {
        self.slots.insert((moe, expert), slot);
    }

    /// An expert loses its slot, `bytes` at `offset` of `buffer`: it is set aside unless it
    /// is here already or there is no room at all.
    pub fn left(
        &mut self,
        device: &GpuDevice,
        (moe, expert): Key,
        locate: impl FnOnce(Slot) -> Option<(Buffer, u64, u64)>,
    ) {
        let key = (moe, expert);
        let Some(slot) = self.slots.remove(&key) else { return };
        if self.classes.get(&slot.class).is_some_and(|class| class.held.contains(&key)) {
            return;
        }
        let Some((buffer, offset, bytes)) = locate(slot) else { return };
        if self.copies.len() >= COPIES_MAX {
            return;
        }
        if let Some(to) = self.room(device, slot.class, bytes) {
            self.copies.push(Copy { from: Place { buffer, offset }, to: to.clone(), bytes });
            if let Some(class) = self.classes.get_mut(&slot.class) {
                class.held.put(key, to);
            }
        }
    }

    /// A place for one more expert of the class: new, or of the one longest unused.
    fn room(&mut self, device: &GpuDevice, class: u16, bytes: u64) -> Option<Place> {
        let known = self
            .classes
            .entry(class)
            .or_insert_with(|| Class { free: Vec::new(), held: LruCache::unbounded() });
        if let Some(place) = known.free.pop() {
            return Some(place);
        }
        let count = (CHUNK_BYTES / bytes).max(1).min(self.left / bytes);
        if let Some(count) = NonZeroUsize::new(usize::try_from(count).ok()?) {
            let size = bytes * count.get() as u64;
            match device.buffer("experts in memory of the host", size, USAGE) {
                Ok(buffer) => {
                    self.left -= size;
                    let places = (0..count.get() as u64).rev();
                    known.free.extend(
                        places.map(|i| Place { buffer: buffer.clone(), offset: i * bytes }),
                    );
                    return known.free.pop();
                }
                // What there is must do.
                Err(error) => {
                    tracing::info!("no more memory of the host for experts: {error}");
                    self.left = 0;
                }
            }
        }
        known.held.pop_lru().map(|(_, place)| place)
    }

    /// Records the copy of an expert into a slot, `bytes` at `offset` of `buffer`; `false` if
    /// it is not here.
    pub fn bring(&mut self, (moe, expert): Key, slot: Slot, to: (Buffer, u64, u64)) -> bool {
        let class = self.classes.get_mut(&slot.class);
        let Some(from) = class.and_then(|class| class.held.get(&(moe, expert))) else {
            return false;
        };
        if self.copies.len() >= COPIES_MAX {
            return false;
        }
        let (buffer, offset, bytes) = to;
        self.copies.push(Copy { from: from.clone(), to: Place { buffer, offset }, bytes });
        true
    }

    /// Whether copies wait for a submission.
    pub fn waits(&self) -> bool {
        !self.copies.is_empty()
    }

    /// The copies recorded so far, in order.
    pub fn encode(&mut self, encoder: &mut CommandEncoder) {
        for Copy { from, to, bytes } in self.copies.drain(..) {
            let Place { buffer, offset } = &from;
            encoder.copy_buffer_to_buffer(buffer, *offset, &to.buffer, to.offset, Some(bytes));
        }
    }
}
