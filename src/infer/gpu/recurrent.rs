//! The recurrent states on a device, and ops that change them: one buffer a layer, `[places, RING,
//! width]` (`crate::recurrent`), and the number of the place of the sequence that steps.

use wgpu::BufferUsages;

use super::buffers::stride;
use super::device::GpuDevice;
use super::dispatch::{Grid, Rows};
use super::lower::{Lower, Place, Recipe, expect, recipe_grid, refused, word};
use super::params;
use super::pipelines::Reduction;
use crate::backend::{BackendError, Result};
use crate::graph::{Buf, ConvForm, DeltaShape, Graph, Op, StateId, WeightId};
use crate::kv::BlockCopy;
use crate::recurrent::RING;

/// kernels/delta.wgsl
const KEY_DIM_MAX: usize = 256;

/// kernels/conv.wgsl
const TAPS_MAX: usize = 8;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

/// A device's recurrent states.
pub(super) struct Recurrent {
    layers: Vec<wgpu::Buffer>,
    slot: wgpu::Buffer,
    /// What the device has in `slot`.
    current: u32,
}

/// Bytes of one sequence's states of a layer.
fn bytes_of(graph: &Graph, layer: usize) -> u64 {
    (graph.states[layer].width * RING * 4) as u64
}

impl Recurrent {
    /// Room for one sequence.
    pub fn new(device: &GpuDevice, graph: &Graph) -> Result<Self> {
        let what = "the recurrent states of one layer";
        let layers =
            (0..graph.states.len()).map(|i| device.buffer(what, bytes_of(graph, i), STORAGE));
        let layers = layers.collect::<Result<_>>()?;
        let slot = device.buffer("the place of recurrent states", 16, STORAGE)?;
        Ok(Self { layers, slot, current: 0 })
    }

    pub fn of(&self, id: StateId) -> &wgpu::Buffer {
        &self.layers[usize::from(id.0)]
    }

    pub const fn slot(&self) -> &wgpu::Buffer {
        &self.slot
    }

    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(wgpu::Buffer::size).sum::<u64>() + self.slot.size()
    }

    /// Bytes of one sequence's states.
    pub fn slot_bytes(&self, graph: &Graph) -> u64 {
        (0..graph.states.len()).map(|i| bytes_of(graph, i)).sum()
    }

    /// Makes room for `count` sequences, layer by layer. Contents are kept.
    pub fn grow(&mut self, device: &GpuDevice, graph: &Graph, count: usize) -> Result<()> {
        for (i, of) in self.layers.iter_mut().enumerate() {
            let what = format!("the recurrent states of one layer for {count} sequences");
            let bytes = bytes_of(graph, i).saturating_mul(count as u64);
            if bytes > device.binding_bytes_max() {
                return Err(BackendError::OutOfMemory { what, bytes });
            }
            if bytes <= of.size() {
                continue;
            }
            let new = device.buffer(&what, bytes, STORAGE)?;
            let label = Some("recurrent states move");
            let mut encoder =
                device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            encoder.copy_buffer_to_buffer(of, 0, &new, 0, Some(of.size()));
            device.submit(encoder)?;
            *of = new;
            // The old buffer is freed before the next layer's is made.
            device.flush()?;
        }
        Ok(())
    }

    /// Copies a sequence's states to another place.
    pub fn copy(&self, device: &GpuDevice, graph: &Graph, copy: BlockCopy) -> Result<()> {
        let label = Some("recurrent states are copied");
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        // WebGPU cannot copy within a buffer.
        let usage = BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let most = (0..self.layers.len()).map(|i| bytes_of(graph, i)).max().unwrap_or(0);
        let between = device.buffer("recurrent states being copied", most, usage)?;
        for (i, of) in self.layers.iter().enumerate() {
            let bytes = bytes_of(graph, i);
            let (from, to) = (u64::from(copy.from) * bytes, u64::from(copy.to) * bytes);
            encoder.copy_buffer_to_buffer(of, from, &between, 0, Some(bytes));
            encoder.copy_buffer_to_buffer(&between, 0, of, to, Some(bytes));
        }
        device.submit(encoder)?;
        Ok(())
    }

    /// Sets the place of the sequence that steps next.
    pub fn set(&mut self, device: &GpuDevice, slot: u32) {
        if std::mem::replace(&mut self.current, slot) != slot {
            device.write(&self.slot, 0, bytemuck::bytes_of(&slot));
        }
    }
}

impl Lower<'_> {
    pub(super) fn conv(
        &self,
        op: &Op,
        state: StateId,
        (x, filter, out): (Buf, WeightId, Buf),
        form: ConvForm,
    ) -> Result<Recipe> {
        let channels = self.width(out);
        let parts = match form {
            ConvForm::Gated => 3,
            ConvForm::Silu => 1,
        };
        let taps = self.graph.weight_spec(filter).cols / channels.max(1);
        let width = self.graph.state_spec(state).width;
        expect(self.width(x) == parts * channels && x != out, op)?;
        expect((2..=TAPS_MAX).contains(&taps) && width == (taps - 1) * channels, op)?;
        expect(self.graph.weight_spec(filter).cols == taps * channels, op)?;
        let params = params::Conv {
            channels: word(channels)?,
            taps: word(taps)?,
            x_stride: word(stride(self.width(x)))?,
            result_stride: word(stride(channels))?,
            ring: word(RING)?,
            gated: u32::from(form == ConvForm::Gated),
        };
        let storage = [
            Place::Activation(x),
            self.vector(filter)?,
            Place::RecurrentSlot,
            Place::Recurrent(state),
            Place::Activation(out),
        ];
        let grid = Grid::fixed(word(channels.div_ceil(64))?);
        Ok(recipe_grid("conv", &params, &storage, Rows::Tokens, grid))
    }

    pub(super) fn delta(&self, op: &Op) -> Result<Recipe> {
        let Op::Delta { state, x, gates, decays, shifts, out, ref shape } = *op else {
            return Err(refused("another op as a delta net".into()));
        };
        let &DeltaShape { key_heads, heads, key_dim, value_dim } = shape;
        let all = heads * value_dim;
        let vector = |id: WeightId| self.graph.weight_spec(id).cols == heads;
        expect(key_heads > 0 && heads.is_multiple_of(key_heads) && key_dim <= KEY_DIM_MAX, op)?;
        expect(self.width(x) == shape.x_width() && self.width(gates) == 2 * heads, op)?;
        expect(self.width(out) == all && ![x, gates].contains(&out), op)?;
        expect(vector(decays) && vector(shifts), op)?;
        expect(self.graph.state_spec(state).width == shape.state_width(), op)?;
        let params = params::Delta {
            key_heads: word(key_heads)?,
            heads: word(heads)?,
            key_dim: word(key_dim)?,
            value_dim: word(value_dim)?,
            x_stride: word(stride(self.width(x)))?,
            gates_stride: word(stride(2 * heads))?,
            result_stride: word(stride(all))?,
            ring: word(RING)?,
        };
        let storage = [
            Place::Activation(x),
            Place::Activation(gates),
            self.vector(decays)?,
            self.vector(shifts)?,
            Place::RecurrentSlot,
            Place::Recurrent(state),
            Place::Activation(out),
        ];
        let workgroups = match self.reduction {
            Reduction::Lane => all.div_ceil(64),
            Reduction::Group => heads * value_dim.div_ceil(8),
        };
        let kernel = format!("delta_{}", self.reduction.name());
        let grid = Grid::fixed(word(workgroups)?);
        Ok(recipe_grid(&kernel, &params, &storage, Rows::Tokens, grid))
    }
}
