//! Expert slots: device memory of fixed stride that the pager fills, and the tables with which
//! kernels find experts.
//!
//! A class (one expert layout) is a run of slots. If a binding cannot hold them all, it is divided
//! into chunks of one buffer each. A slot holds the expert's gate, up and down planes, one after
//! the other. Each MoE layer has a table of `[chunks, experts]` slot numbers within the chunk, or
//! [`EMPTY`]. A wave writes the rows that changed, and the kernels read them.

use wgpu::BufferUsages;

use super::device::GpuDevice;
use super::lower::mixed_experts;
use super::repack::Packed;
use super::weights::{Uploads, WEIGHT};
use crate::backend::{BackendError, Result, Slot, SlotClass};
use crate::graph::{ExpertLayout, Graph, MatrixSpec, Moe, MoeId};

/// shared/slots.wgsl
pub(super) const EMPTY: u32 = u32::MAX;

/// How an expert is laid out in its slot, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotShape {
    pub gate: (Packed, usize),
    pub up: (Packed, usize),
    pub down: (Packed, usize),
    /// From one slot to the next.
    pub stride: usize,
}

impl SlotShape {
    pub fn of(layout: &ExpertLayout) -> Self {
        let [gate, up, down] = [layout.gate, layout.up, layout.down].map(|m| Packed::of(&m));
        let up_at = gate.bytes();
        let down_at = up_at + up.bytes();
        Self {
            gate: (gate, 0),
            up: (up, up_at),
            down: (down, down_at),
            stride: down_at + down.bytes(),
        }
    }
}

/// The single chunk that holds all slots of a MoE layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home {
    pub class: u16,
    pub chunk: usize,
    pub shape: SlotShape,
}

/// One buffer of slots.
pub(super) struct Chunk {
    pub class: usize,
    pub buffer: wgpu::Buffer,
}

/// A run of slots, and its division into chunks.
pub(super) struct Class {
    pub layout: ExpertLayout,
    pub shape: SlotShape,
    pub count: u32,
    pub slots_per_chunk: u32,
    /// Index into `Experts::chunks`.
    pub first_chunk: usize,
}

impl Class {
    /// A class with chunks of at most `binding_bytes_max` each, numbered from `first_chunk`.
    pub fn new(class: &SlotClass, first_chunk: usize, binding_bytes_max: u64) -> Result<Self> {
        let SlotClass { layout, count } = *class;
        for matrix in [layout.gate, layout.up, layout.down] {
            if !inside(&matrix, layout.bytes) {
                let what = format!("an expert of {} bytes with {matrix:?} in it", layout.bytes);
                return Err(BackendError::Unsupported(what));
            }
        }
        if layout.gate.dtype != layout.up.dtype {
            return Err(mixed_experts(layout.gate.dtype, layout.up.dtype));
        }
        let shape = SlotShape::of(&layout);
        let stride = shape.stride as u64;
        let most = binding_bytes_max / stride.max(1);
        if most == 0 {
            let what = format!("one expert slot (a binding holds {binding_bytes_max})");
            return Err(BackendError::OutOfMemory { what, bytes: stride });
        }
        let too_many = |_| BackendError::OutOfMemory {
            what: format!("{count} expert slots"),
            bytes: stride.saturating_mul(count as u64),
        };
        let count = u32::try_from(count).map_err(too_many)?;
        let slots_per_chunk = u32::try_from(most).unwrap_or(u32::MAX).min(count.max(1));
        Ok(Self { layout, shape, count, slots_per_chunk, first_chunk })
    }

    /// Where the experts of a layer of this class (number `index`) are. `None` if a chunk cannot
    /// hold them all, or they have another shape.
    pub fn home(&self, index: u16, spec: &Moe) -> Option<Home> {
        let shape = self.shape;
        let is = |of: &Packed, rows, cols| (of.rows, of.cols) == (rows, cols);
        let fits = self.count <= self.slots_per_chunk
            && is(&shape.gate.0, spec.ff, spec.hidden)
            && is(&shape.up.0, spec.ff, spec.hidden)
            && is(&shape.down.0, spec.hidden, spec.ff);
        fits.then_some(Home { class: index, chunk: self.first_chunk, shape })
    }

    /// The number of slots in each chunk.
    pub fn chunks(&self) -> impl Iterator<Item = u32> {
        let (count, most) = (self.count, self.slots_per_chunk);
        (0..count).step_by(most as usize).map(move |first| most.min(count - first))
    }
}

/// A MoE layer's table.
struct Table {
    buffer: wgpu::Buffer,
    /// The buffer's contents, by chunk.
    rows: Vec<Vec<u32>>,
}

/// All slots of a backend.
#[derive(Default)]
pub(super) struct Experts {
    classes: Vec<Class>,
    pub chunks: Vec<Chunk>,
    tables: Vec<Table>,
    planes: Vec<u8>,
    /// The class of each MoE layer.
    class_of: Vec<u16>,
}

impl Experts {
    /// Allocates the classes' slots, in chunks of at most `binding_bytes_max`.
    pub fn alloc(
        device: &GpuDevice,
        graph: &Graph,
        classes: &[SlotClass],
        class_of: &[u16],
        binding_bytes_max: u64,
    ) -> Result<Self> {
        let mut experts = Self { class_of: class_of.to_vec(), ..Self::default() };
        for class in classes {
            experts.add_class(device, class, binding_bytes_max)?;
        }
        if experts.chunks.is_empty() {
            return Ok(experts);
        }
        for moe in &graph.moe {
            let rows = vec![vec![EMPTY; moe.experts.len()]; experts.chunks.len()];
            let bytes = experts.chunks.len() as u64 * moe.experts.len() as u64 * 4;
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
            let buffer = device.buffer("a slot table", bytes, usage)?;
            device.write(&buffer, 0, bytemuck::cast_slice(&rows.concat()));
            experts.tables.push(Table { buffer, rows });
        }
        Ok(experts)
    }

    fn add_class(
        &mut self,
        device: &GpuDevice,
        class: &SlotClass,
        binding_bytes_max: u64,
    ) -> Result<()> {
        let index = self.classes.len();
        let class = Class::new(class, self.chunks.len(), binding_bytes_max)?;
        for slots in class.chunks() {
            let what = format!("{slots} expert slots");
            let bytes = class.shape.stride as u64 * u64::from(slots);
            let buffer = device.buffer(&what, bytes, WEIGHT)?;
            self.chunks.push(Chunk { class: index, buffer });
        }
        self.classes.push(class);
        Ok(())
    }

    /// The shapes of the slots, by chunk.
    pub fn shapes(&self) -> Vec<SlotShape> {
        self.chunks.iter().map(|chunk| self.classes[chunk.class].shape).collect()
    }

    /// For each MoE layer, the chunk that holds all its slots, if there is one.
    pub fn homes(&self, graph: &Graph) -> Vec<Option<Home>> {
        let home = |(i, spec): (u16, &Moe)| {
            let class = self.class_of(MoeId(i))?;
            self.classes.get(usize::from(class))?.home(class, spec)
        };
        (0..).zip(&graph.moe).map(home).collect()
    }

    /// A MoE layer's table. It exists once there are slots.
    pub fn table(&self, moe: usize) -> Option<&wgpu::Buffer> {
        self.tables.get(moe).map(|table| &table.buffer)
    }

    /// Writes an expert's stored bytes into a slot, before anything that is submitted later.
    pub fn fill(
        &mut self,
        device: &GpuDevice,
        uploads: &mut Uploads,
        slot: Slot,
        bytes: &[u8],
    ) -> Result<()> {
        let (chunk, index) = self.place(slot)?;
        let class = &self.classes[usize::from(slot.class)];
        let SlotShape { gate, up, down, stride } = class.shape;
        if bytes.len() != class.layout.bytes {
            return Err(BackendError::Unsupported(format!(
                "{} bytes given for an expert of {}",
                bytes.len(),
                class.layout.bytes
            )));
        }
        self.planes.resize(stride, 0);
        let parts = [(class.layout.gate, gate), (class.layout.up, up), (class.layout.down, down)];
        for (matrix, (packed, at)) in parts {
            let stored = &bytes[matrix.offset..matrix.offset + matrix.bytes()];
            packed.pack(stored, &mut self.planes[at..at + packed.bytes()]);
        }
        let offset = stride as u64 * u64::from(index);
        uploads.write(device, &self.chunks[chunk].buffer, offset, &self.planes)
    }

    /// The class of a layer's slots.
    pub fn class_of(&self, moe: MoeId) -> Option<u16> {
        self.class_of.get(usize::from(moe.0)).copied()
    }

    /// Bytes of one of a layer's slots.
    pub fn slot_bytes(&self, moe: MoeId) -> Option<u64> {
        let class = self.classes.get(usize::from(self.class_of(moe)?))?;
        Some(class.shape.stride as u64)
    }

    /// A slot's buffer, its offset there, and its size in bytes.
    pub fn locate(&self, slot: Slot) -> Option<(wgpu::Buffer, u64, u64)> {
        let (chunk, index) = self.place(slot).ok()?;
        let stride = self.classes[usize::from(slot.class)].shape.stride as u64;
        Some((self.chunks[chunk].buffer.clone(), stride * u64::from(index), stride))
    }

    /// The chunk of a slot, and the slot's number in it.
    fn place(&self, slot: Slot) -> Result<(usize, u32)> {
        let class = self.classes.get(usize::from(slot.class));
        let class = class
            .filter(|class| slot.index < class.count)
            .ok_or_else(|| BackendError::Unsupported(format!("{slot:?} was never allocated")))?;
        let chunk = class.first_chunk + (slot.index / class.slots_per_chunk) as usize;
        Ok((chunk, slot.index % class.slots_per_chunk))
    }

    /// The table that a wave needs: rows of slot numbers, by chunk.
    pub fn wave(&self, slots: &[Option<Slot>]) -> Result<Vec<Vec<u32>>> {
        let mut rows = vec![vec![EMPTY; slots.len()]; self.chunks.len()];
        for (expert, slot) in slots.iter().enumerate() {
            if let Some(slot) = slot {
                let (chunk, index) = self.place(*slot)?;
                rows[chunk][expert] = index;
            }
        }
        Ok(rows)
    }

    /// Whether the layer's table already has these rows.
    pub fn table_holds(&self, moe: usize, rows: &[Vec<u32>]) -> bool {
        self.tables[moe].rows == rows
    }

    /// Writes the rows that differ, before anything that is submitted later.
    pub fn write_table(&mut self, device: &GpuDevice, moe: usize, rows: Vec<Vec<u32>>) {
        let table = &mut self.tables[moe];
        for (chunk, (old, new)) in table.rows.iter().zip(&rows).enumerate() {
            if old != new {
                let offset = (chunk * new.len() * 4) as u64;
                device.write(&table.buffer, offset, bytemuck::cast_slice(new));
            }
        }
        table.rows = rows;
    }
}

/// Whether a matrix is within `bytes`.
fn inside(matrix: &MatrixSpec, bytes: usize) -> bool {
    let row = matrix.dtype.row_bytes(matrix.cols);
    let end = matrix.rows.checked_mul(row).and_then(|size| size.checked_add(matrix.offset));
    end.is_some_and(|end| end <= bytes)
}
