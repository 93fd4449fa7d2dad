//! A graph's ops as dispatches: made once, when the weights and slots are in
//! place, and replayed each step.
//!
//! Shapes are checked here, so a graph that no kernel fits is refused before the
//! first step. Parameters are static; a grid grows with the step's rows.

use bytemuck::Pod;
use wgpu::BufferUsages;

use super::batch::{ExpertProducts, Product};
use super::buffers::{Buffers, stride};
use super::decode::{DecodeBuffers, Fused, Sequence};
use super::device::GpuDevice;
use super::dispatch::{Dispatch, Grid, Rows};
use super::experts::Experts;
use super::params::{self, ARENA_SLOT, Arena};
use super::pipelines::format_name;
use super::spill::Spill;
use super::weights::{DeviceWeight, matrix, vector};
use crate::infer::backend::{BackendError, KvFormat, Result};
use crate::infer::graph::{Activation, Buf, Graph, Moe, MoeId, Op, Scoring, WeightId};

/// The widest head the attention kernel holds.
const HEAD_DIM_MAX: usize = 256;

/// A chunk's dispatches of one wave: gate and up, then down, for few tokens and for many.
pub(super) type Wave = Vec<Dispatch>;

pub(super) struct Plan {
    common: wgpu::BindGroup,
    /// By op; for an `Experts` op the final sum.
    pub ops: Vec<Vec<Dispatch>>,
    /// By op and chunk; `None` where the chunk's layout is not this layer's.
    pub waves: Vec<Vec<Option<Wave>>>,
    /// The fused form of one token's step.
    pub decode: Option<Sequence>,
}

/// What a plan is made from.
pub(super) struct Parts<'a> {
    pub device: &'a GpuDevice,
    pub graph: &'a Graph,
    pub buffers: &'a Buffers,
    pub weights: &'a [Option<DeviceWeight>],
    pub experts: &'a Experts,
    pub spill: Option<&'a Spill>,
    pub kv: KvFormat,
    /// For a graph whose single tokens run fused.
    pub decode: Option<(&'a Fused, &'a DecodeBuffers)>,
    /// The most tokens of a step.
    pub batch: usize,
}

impl Plan {
    pub fn new(parts: &Parts<'_>) -> Result<Self> {
        let device = parts.device;
        let mut builder = Builder { parts, halved: None, arena: Arena::default() };
        let mut ops = Vec::with_capacity(parts.graph.ops.len());
        let mut waves = Vec::with_capacity(parts.graph.ops.len());
        for op in &parts.graph.ops {
            ops.push(builder.op(op)?);
            waves.push(match *op {
                Op::Experts { moe, x, .. } => builder.waves(moe, x)?,
                _ => Vec::new(),
            });
        }
        let decode = match parts.decode {
            Some((fused, buffers)) => Some(Sequence::new(&mut builder, fused, buffers)?),
            None => None,
        };
        if !ARENA_SLOT.is_multiple_of(device.params_alignment()) {
            let need = device.params_alignment();
            return Err(BackendError::Unsupported(format!("uniform offsets aligned to {need}")));
        }
        let bytes = builder.arena.bytes();
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let size = (bytes.len() as u64).max(ARENA_SLOT);
        let arena = device.buffer("kernel parameters", size, usage)?;
        device.write(&arena, 0, bytes);
        let common = device.scoped("the parameters' bind group", 0, |wgpu| {
            let binding = wgpu::BufferBinding {
                buffer: &arena,
                offset: 0,
                size: std::num::NonZeroU64::new(ARENA_SLOT),
            };
            wgpu.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("step and parameters"),
                layout: &device.pipelines().common,
                entries: &[
                    wgpu::BindGroupEntry {
                        binding: 0,
                        resource: parts.buffers.step.as_entire_binding(),
                    },
                    wgpu::BindGroupEntry {
                        binding: 1,
                        resource: wgpu::BindingResource::Buffer(binding),
                    },
                ],
            })
        })?;
        Ok(Self { common, ops, waves, decode })
    }

    /// Records a dispatch, if it is made for this step. Returns how many that are.
    pub fn encode(
        &self,
        device: &GpuDevice,
        pass: &mut wgpu::ComputePass<'_>,
        dispatch: &Dispatch,
        step: &params::Step,
    ) -> Result<u64> {
        let name = dispatch.pipeline.kernel.name;
        let grid = dispatch.workgroups(step, device.workgroups_max()).map_err(|rows| {
            BackendError::Unsupported(format!("{name} over {rows} rows at once"))
        })?;
        let Some((x, y)) = grid else { return Ok(0) };
        pass.set_pipeline(&dispatch.pipeline.pipeline);
        pass.set_bind_group(0, &self.common, &[dispatch.params]);
        pass.set_bind_group(1, &dispatch.storage, &[]);
        pass.dispatch_workgroups(x, y, 1);
        Ok(1)
    }
}

/// What a plan is made with; batch.rs adds the forms for many tokens.
pub(super) struct Builder<'a> {
    pub parts: &'a Parts<'a>,
    /// Whose rows `halves` holds while linear products follow one another.
    pub halved: Option<Buf>,
    arena: Arena,
}

impl Builder<'_> {
    pub fn dispatch(
        &mut self,
        kernel: &str,
        params: &impl Pod,
        storage: &[&wgpu::Buffer],
        rows: Rows,
        (items, per_workgroup): (usize, u32),
    ) -> Result<Dispatch> {
        let items = items as u64;
        self.dispatch_grid(kernel, params, storage, rows, Grid::Items { items, per_workgroup })
    }

    pub fn dispatch_grid(
        &mut self,
        kernel: &str,
        params: &impl Pod,
        storage: &[&wgpu::Buffer],
        rows: Rows,
        grid: Grid,
    ) -> Result<Dispatch> {
        let device = self.parts.device;
        let pipeline = device.pipelines().get(device, kernel)?;
        // WGSL may pad the struct's end. A mismatch is a mistake in this file.
        let declared_bytes = pipeline.kernel.params_bytes as usize;
        assert_eq!(size_of_val(params).next_multiple_of(16), declared_bytes.next_multiple_of(16));
        let storage = pipeline.bind(device, storage)?;
        let params = self.arena.push(params);
        Ok(Dispatch { pipeline, storage, params, rows, grid, when: 1..=u32::MAX })
    }

    pub fn width(&self, buf: Buf) -> usize {
        self.parts.graph.width(buf)
    }

    /// The suffix of reducing kernels and the rows a workgroup of theirs sums.
    fn reduction(&self) -> (&'static str, u32) {
        let reduction = self.parts.device.pipelines().reduction;
        (reduction.name(), reduction.rows_per_workgroup())
    }

    fn op(&mut self, op: &Op) -> Result<Vec<Dispatch>> {
        let parts = self.parts;
        if !matches!(op, Op::Linear { .. }) {
            self.halved = None;
        }
        let one = match *op {
            Op::Embed { table, out, scale } => return self.embed(table, out, scale),
            Op::Linear { x, weight, bias, out } => {
                let result = parts.buffers.activation(out);
                let result_stride = stride(self.width(out));
                expect(self.width(out) == parts.graph.weight_spec(weight).rows, op)?;
                return self.linear(x, weight, bias, result, result_stride, Rows::Tokens);
            }
            Op::Logits { x, weight } => {
                expect(parts.graph.weight_spec(weight).rows == parts.graph.vocab, op)?;
                let result = &parts.buffers.logits;
                return self.linear(x, weight, None, result, parts.graph.vocab, Rows::Logits);
            }
            Op::RmsNorm { x, weight, out, eps } => self.rms_norm(op, x, weight, out, eps),
            Op::Rope { x, heads, head_dim, rope } => {
                let pairs = parts.graph.rope_spec(rope).inv_freq.len();
                expect(2 * pairs <= head_dim && heads * head_dim == self.width(x), op)?;
                let params = params::Rope {
                    heads: word(heads)?,
                    head_dim: word(head_dim)?,
                    pairs: word(pairs)?,
                    stride: word(stride(self.width(x)))?,
                };
                let storage = [parts.buffers.rope(rope), parts.buffers.activation(x)];
                self.dispatch("rope", &params, &storage, Rows::Tokens, (heads * pairs, 64))
            }
            Op::KvWrite { kv, k, v } => {
                let shape = parts.graph.kv_spec(kv);
                let width = shape.kv_heads * shape.head_dim;
                expect(self.width(k) == width && self.width(v) == width, op)?;
                expect(width.is_multiple_of(2), op)?;
                let params = params::KvWrite {
                    width: word(width)?,
                    k_stride: word(stride(width))?,
                    v_stride: word(stride(width))?,
                };
                let cache = parts.buffers.kv(kv);
                let (k, v) = (parts.buffers.activation(k), parts.buffers.activation(v));
                let storage = [k, v, &cache.keys, &cache.values];
                let kernel = format!("kv_write_{}", parts.kv.name());
                self.dispatch(&kernel, &params, &storage, Rows::Tokens, (width / 2, 64))
            }
            Op::Attention { kv, q, out, heads, scale, window } => {
                let shape = parts.graph.kv_spec(kv);
                let head_dim = shape.head_dim;
                expect(head_dim.is_multiple_of(4) && head_dim <= HEAD_DIM_MAX, op)?;
                expect(shape.kv_heads > 0 && heads % shape.kv_heads == 0, op)?;
                let width = heads * head_dim;
                expect(self.width(q) == width && self.width(out) == width, op)?;
                let params = params::Attention {
                    heads: word(heads)?,
                    kv_heads: word(shape.kv_heads)?,
                    head_dim: word(head_dim)?,
                    q_stride: word(stride(width))?,
                    result_stride: word(stride(width))?,
                    window: word(window.unwrap_or(0))?,
                    scale,
                };
                expect(window != Some(0), op)?;
                let cache = parts.buffers.kv(kv);
                let (q, out) = (parts.buffers.activation(q), parts.buffers.activation(out));
                let storage = [q, &cache.keys, &cache.values, out];
                let kernel = format!("attention_{}", parts.kv.name());
                let mut single =
                    self.dispatch(&kernel, &params, &storage, Rows::Tokens, (heads, 1))?;
                let Some((many, from)) = self.attention_batch(&params, &storage)? else {
                    return Ok(vec![single]);
                };
                single.when = 1..=from - 1;
                return Ok(vec![single, many]);
            }
            Op::Gated { gate, up, out, activation } => self.gated(op, gate, up, out, activation),
            Op::Add { x, y } => {
                let quads = stride(self.width(x)) / 4;
                expect(self.width(x) == self.width(y), op)?;
                let params = params::Add { stride: word(quads)? };
                let storage = [parts.buffers.activation(y), parts.buffers.activation(x)];
                self.dispatch("add", &params, &storage, Rows::Tokens, (quads, 64))
            }
            Op::Route { moe, logits, scoring } => {
                let spec = parts.graph.moe_spec(moe);
                let experts = spec.experts.len();
                expect(self.width(logits) == experts, op)?;
                expect((1..=experts).contains(&spec.top_k), op)?;
                let Scoring::Softmax { renormalise } = scoring;
                let params = params::Route {
                    experts: word(experts)?,
                    top_k: word(spec.top_k)?,
                    stride: word(stride(experts))?,
                    renormalise: u32::from(renormalise),
                };
                let routing = parts.buffers.routing(moe);
                let logits = parts.buffers.activation(logits);
                let storage = [logits, &routing.ids, &routing.shares];
                let route = self.dispatch("route", &params, &storage, Rows::Tokens, (1, 64))?;
                let group = self.group(moe, spec)?;
                return Ok([route].into_iter().chain(group).collect());
            }
            Op::Experts { moe, x, out } => {
                let spec = parts.graph.moe_spec(moe);
                expect(self.width(x) == spec.hidden && self.width(out) == spec.hidden, op)?;
                let params = params::ExpertSum {
                    cols: word(spec.hidden)?,
                    top_k: word(spec.top_k)?,
                    pair_stride: word(stride(spec.hidden))?,
                    result_stride: word(stride(spec.hidden))?,
                };
                let shares = &parts.buffers.routing(moe).shares;
                let out = parts.buffers.activation(out);
                let storage = [&parts.buffers.pair_outputs, shares, out];
                self.dispatch("expert_sum", &params, &storage, Rows::Tokens, (spec.hidden, 64))
            }
        };
        Ok(vec![one?])
    }

    pub fn embed(&mut self, table: WeightId, out: Buf, scale: f32) -> Result<Vec<Dispatch>> {
        let parts = self.parts;
        let quads = stride(self.width(out)) / 4;
        let result = parts.buffers.activation(out);
        let mut dispatches = Vec::new();
        for piece in matrix(parts.graph, parts.weights, table)? {
            if piece.packed.cols != self.width(out) {
                return Err(refused(format!("an embedding of {} columns", piece.packed.cols)));
            }
            let params = params::Embed {
                table: piece.packed.matrix(piece.at),
                row_start: word(piece.row_start)?,
                rows: word(piece.packed.rows)?,
                cols: word(piece.packed.cols)?,
                stride: word(quads)?,
                scale,
            };
            let kernel = format!("embed_{}", format_name(piece.packed.dtype));
            let storage = [&parts.buffers.tokens, &piece.buffer, result];
            let items = (quads, 64);
            dispatches.push(self.dispatch(&kernel, &params, &storage, Rows::Tokens, items)?);
        }
        Ok(dispatches)
    }

    fn linear(
        &mut self,
        x: Buf,
        weight: WeightId,
        bias: Option<WeightId>,
        result: &wgpu::Buffer,
        result_stride: usize,
        rows: Rows,
    ) -> Result<Vec<Dispatch>> {
        let parts = self.parts;
        let (reduce, per_workgroup) = self.reduction();
        let bias_buffer = match bias {
            Some(id) => {
                let rows = parts.graph.weight_spec(weight).rows;
                if parts.graph.weight_spec(id).cols != rows {
                    return Err(refused(format!("a bias that has not {rows} elements")));
                }
                vector(parts.graph, parts.weights, id)?
            }
            None => &parts.buffers.empty,
        };
        let mut dispatches = Vec::new();
        for piece in matrix(parts.graph, parts.weights, weight)? {
            if piece.packed.cols != self.width(x) {
                let name = &parts.graph.weight_spec(weight).tensor;
                return Err(refused(format!("{name} over {} columns", self.width(x))));
            }
            let params = params::Linear {
                weight: piece.packed.matrix(piece.at),
                row_start: word(piece.row_start)?,
                rows: word(piece.packed.rows)?,
                x_stride: word(stride(self.width(x)) / 4)?,
                result_stride: word(result_stride)?,
                has_bias: u32::from(bias.is_some()),
                logits: u32::from(rows == Rows::Logits),
            };
            let kernel = format!("linear_{}_{reduce}", format_name(piece.packed.dtype));
            let storage = [parts.buffers.activation(x), &piece.buffer, bias_buffer, result];
            let items = (piece.packed.rows, per_workgroup);
            let mut single = self.dispatch(&kernel, &params, &storage, rows, items)?;
            let product = Product {
                dtype: piece.packed.dtype,
                params,
                x,
                weights: &piece.buffer,
                bias: bias_buffer,
                result,
                rows,
            };
            let (many, from) = self.linear_batch(&product)?;
            single.when = 1..=from - 1;
            dispatches.push(single);
            dispatches.extend(many);
        }
        Ok(dispatches)
    }

    fn rms_norm(
        &mut self,
        op: &Op,
        x: Buf,
        weight: WeightId,
        out: Buf,
        eps: f32,
    ) -> Result<Dispatch> {
        let parts = self.parts;
        let (reduce, per_workgroup) = self.reduction();
        let cols = parts.graph.weight_spec(weight).cols;
        expect(
            cols > 0 && self.width(x).is_multiple_of(cols) && self.width(x) == self.width(out),
            op,
        )?;
        let groups = self.width(x) / cols;
        let row = word(stride(self.width(x)))?;
        let params = params::RmsNorm {
            cols: word(cols)?,
            groups: word(groups)?,
            source_stride: row,
            result_stride: row,
            eps,
        };
        let weight = vector(parts.graph, parts.weights, weight)?;
        let (source, result) = (parts.buffers.activation(x), parts.buffers.activation(out));
        let items = (groups, per_workgroup);
        if x == out {
            let kernel = format!("rms_norm_inplace_{reduce}");
            self.dispatch(&kernel, &params, &[result, weight], Rows::Tokens, items)
        } else {
            let kernel = format!("rms_norm_split_{reduce}");
            self.dispatch(&kernel, &params, &[source, weight, result], Rows::Tokens, items)
        }
    }

    fn gated(
        &mut self,
        op: &Op,
        gate: Buf,
        up: Buf,
        out: Buf,
        act: Activation,
    ) -> Result<Dispatch> {
        let parts = self.parts;
        let width = self.width(out);
        expect(self.width(gate) == width && self.width(up) == width, op)?;
        let params = params::Gated {
            stride: word(stride(width))?,
            activation: activation_code(act),
            swapped: u32::from(out == up),
        };
        let items = (stride(width), 64);
        let [g, u, o] = [gate, up, out].map(|buf| parts.buffers.activation(buf));
        if out == gate {
            self.dispatch("gated_inplace", &params, &[o, u], Rows::Tokens, items)
        } else if out == up {
            self.dispatch("gated_inplace", &params, &[o, g], Rows::Tokens, items)
        } else {
            self.dispatch("gated_split", &params, &[g, u, o], Rows::Tokens, items)
        }
    }

    /// An `Experts` op's dispatches for each chunk of slots that fits the layer.
    fn waves(&mut self, moe: MoeId, x: Buf) -> Result<Vec<Option<Wave>>> {
        let parts = self.parts;
        let spec = parts.graph.moe_spec(moe);
        let mut waves = Vec::new();
        for (index, chunk) in parts.experts.chunks.iter().enumerate() {
            let shape = parts.experts.shape(chunk);
            let fits = |packed: &super::repack::Packed, rows, cols| {
                packed.rows == rows && packed.cols == cols
            };
            if fits(&shape.gate.0, spec.ff, spec.hidden)
                && fits(&shape.up.0, spec.ff, spec.hidden)
                && fits(&shape.down.0, spec.hidden, spec.ff)
            {
                waves.push(Some(self.wave(moe, spec, x, index)?));
            } else {
                waves.push(None);
            }
        }
        Ok(waves)
    }

    fn wave(&mut self, moe: MoeId, spec: &Moe, x: Buf, index: usize) -> Result<Wave> {
        let parts = self.parts;
        let (reduce, per_workgroup) = self.reduction();
        let chunk = &parts.experts.chunks[index];
        let shape = parts.experts.shape(chunk);
        let ((gate, gate_at), (up, up_at), (down, down_at)) = (shape.gate, shape.up, shape.down);
        if gate.dtype != up.dtype {
            let (gate, up) = (gate.dtype, up.dtype);
            return Err(refused(format!("experts with {gate} gates and {up} ups")));
        }
        let table = parts.experts.table(usize::from(moe.0));
        let table = table.ok_or_else(|| refused("experts without slots".into()))?;
        let slot_stride = word(shape.stride / 4)?;
        let slots_at = word(index * spec.experts.len())?;
        let ids = &parts.buffers.routing(moe).ids;
        let inner = &parts.buffers.pair_inner;
        let gate_up = params::ExpertGateUp {
            gate: gate.matrix(gate_at),
            up: up.matrix(up_at),
            rows: word(spec.ff)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            slots_at,
            x_stride: word(stride(spec.hidden) / 4)?,
            result_stride: word(stride(spec.ff))?,
            activation: activation_code(spec.activation),
        };
        let kernel = format!("expert_gate_up_{}_{reduce}", format_name(gate.dtype));
        let storage = [parts.buffers.activation(x), &chunk.buffer, ids, table, inner];
        let items = (spec.ff * spec.top_k, per_workgroup);
        let first = self.dispatch(&kernel, &gate_up, &storage, Rows::Tokens, items)?;
        let down_params = params::ExpertDown {
            down: down.matrix(down_at),
            rows: word(spec.hidden)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            slots_at,
            x_stride: word(stride(spec.ff) / 4)?,
            result_stride: word(stride(spec.hidden))?,
        };
        let kernel = format!("expert_down_{}_{reduce}", format_name(down.dtype));
        let storage = [inner, &chunk.buffer, ids, table, &parts.buffers.pair_outputs];
        let items = (spec.hidden * spec.top_k, per_workgroup);
        let second = self.dispatch(&kernel, &down_params, &storage, Rows::Tokens, items)?;
        let mut wave = vec![first, second];
        let experts = ExpertProducts {
            spec,
            x,
            inner: gate.dtype,
            outer: down.dtype,
            gate_up,
            down: down_params,
            weights: &chunk.buffer,
            table,
        };
        if let Some((many, from)) = self.experts_batch(&experts)? {
            wave.iter_mut().for_each(|single| single.when = 1..=from - 1);
            wave.extend(many);
        }
        Ok(wave)
    }
}

pub(super) const fn activation_code(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

pub(super) fn refused(what: String) -> BackendError {
    BackendError::Unsupported(what)
}

fn expect(holds: bool, op: &Op) -> Result<()> {
    if holds { Ok(()) } else { Err(refused(format!("shapes of {op:?}"))) }
}

pub(super) fn word(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| refused(format!("a size of {n}")))
}
