//! A graph's recipes (lower.rs) bound on a device. Made once, when weights and slots are allocated,
//! and replayed at each step.

use std::collections::BTreeMap;

use wgpu::BufferUsages;

use super::buffers::Buffers;
use super::decode::{Aside, DecodeBuffers, Fuse, Points, RowBuffers, TokenSteps};
use super::device::GpuDevice;
use super::dispatch::Dispatch;
use super::experts::{Experts, SlotShape};
use super::lower::{Lower, Place, Recipe, refused};
use super::params::{self, ARENA_SLOT, Arena};
use super::spill::Spill;
use super::weights::{self, DeviceWeight, WeightShape};
use crate::backend::{BackendError, KvFormat, Result};
use crate::graph::{Graph, MoeId, Op};

/// A chunk's dispatches for one wave: gate and up, then down, for few tokens and for many.
pub(super) type Wave = Vec<Dispatch>;

pub(super) struct Plan {
    common: wgpu::BindGroup,
    /// By op. For an `Experts` op, only the final sum.
    pub ops: Vec<Vec<Dispatch>>,
    /// By op and chunk. `None` if the chunk's layout is not this layer's.
    pub waves: Vec<Vec<Option<Wave>>>,
    /// One token's step as one submission, if its experts can be looked up on the device.
    pub decode: Option<TokenSteps<Dispatch, wgpu::Buffer>>,
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
    /// The buffers for single tokens as one submission each, if possible.
    pub decode: Option<&'a DecodeBuffers>,
    /// The most tokens of a step.
    pub batch: usize,
    /// The buffers for rows of several sequences, which take the place of a token's.
    pub rows: Option<&'a RowBuffers>,
}

impl Plan {
    pub fn new(parts: &Parts<'_>) -> Result<Self> {
        let shapes = weights::shapes(parts.weights);
        let chunks = parts.experts.shapes();
        let mut lower = lower(parts, &shapes, &chunks);
        let mut builder = Builder { parts, arena: Arena::default(), joined: BTreeMap::new() };
        let mut ops = Vec::with_capacity(parts.graph.ops.len());
        let mut waves = Vec::with_capacity(parts.graph.ops.len());
        for op in &parts.graph.ops {
            ops.push(builder.bind(&lower.op(op)?)?);
            waves.push(match *op {
                Op::Experts { moe, x, .. } => {
                    let waves = lower.waves(moe, x)?.into_iter();
                    waves.map(|wave| wave.map(|wave| builder.bind(&wave)).transpose()).collect()
                }
                _ => Ok(Vec::new()),
            }?);
        }
        let decode = match parts.decode {
            Some(buffers) => builder.token(buffers, lower)?,
            None => None,
        };
        let common = common(parts, builder.arena.bytes())?;
        Ok(Self { common, ops, waves, decode })
    }

    /// Records a dispatch, if it is used for this step. Returns the number of dispatches recorded
    /// (0 or 1).
    pub fn encode(
        &self,
        device: &GpuDevice,
        pass: &mut wgpu::ComputePass<'_>,
        dispatch: &Dispatch,
        step: &params::Step,
    ) -> Result<u64> {
        encode(device, &self.common, pass, dispatch, (step, &[step.position]))
    }
}

fn encode(
    device: &GpuDevice,
    common: &wgpu::BindGroup,
    pass: &mut wgpu::ComputePass<'_>,
    dispatch: &Dispatch,
    (step, positions): (&params::Step, &[u32]),
) -> Result<u64> {
    let name = dispatch.pipeline.kernel.name;
    let grid = dispatch
        .workgroups(step, positions, device.workgroups_max())
        .map_err(|rows| BackendError::Unsupported(format!("{name} over {rows} rows at once")))?;
    let Some((x, y)) = grid else { return Ok(0) };
    pass.set_pipeline(&dispatch.pipeline.pipeline);
    pass.set_bind_group(0, common, &[dispatch.params]);
    pass.set_bind_group(1, &dispatch.storage, &[]);
    pass.dispatch_workgroups(x, y, 1);
    Ok(1)
}

/// A step of one token of each of several sequences, bound on a device.
pub(super) struct RowsPlan {
    common: wgpu::BindGroup,
    dispatches: Vec<Dispatch>,
}

impl RowsPlan {
    /// `None` if the graph has an op that cannot run for several sequences at once.
    pub fn new(parts: &Parts<'_>) -> Result<Option<Self>> {
        let (shapes, chunks) = (weights::shapes(parts.weights), parts.experts.shapes());
        let Some(buffers) = parts.decode else { return Ok(None) };
        let mut builder = Builder { parts, arena: Arena::default(), joined: BTreeMap::new() };
        let mut fuse = Fuse {
            lower: Lower { batch: 1, cooperative: None, ..lower(parts, &shapes, &chunks) },
            team: parts.device.team(),
            layout: &buffers.layout,
            homes: &parts.experts.homes(parts.graph),
            fetches: &vec![false; parts.graph.moe.len()],
            many: true,
            moved: None,
        };
        let Some(recipes) = fuse.rows()? else { return Ok(None) };
        let dispatches = builder.bind(&recipes)?;
        let common = common(parts, builder.arena.bytes())?;
        Ok(Some(Self { common, dispatches }))
    }

    /// Records the step. Returns the number of dispatches.
    pub fn encode(
        &self,
        device: &GpuDevice,
        pass: &mut wgpu::ComputePass<'_>,
        step: (&params::Step, &[u32]),
    ) -> Result<u64> {
        let mut count = 0;
        for dispatch in &self.dispatches {
            count += encode(device, &self.common, pass, dispatch, step)?;
        }
        Ok(count)
    }
}

fn lower<'a>(parts: &Parts<'a>, weights: &'a [WeightShape], chunks: &'a [SlotShape]) -> Lower<'a> {
    let pipelines = parts.device.pipelines();
    Lower {
        graph: parts.graph,
        weights,
        chunks,
        kv: parts.kv,
        batch: parts.batch,
        reduction: pipelines.reduction,
        cooperative: pipelines.cooperative,
        halved: None,
    }
}

/// Group 0 with the step and the parameters of a plan.
fn common(parts: &Parts<'_>, bytes: &[u8]) -> Result<wgpu::BindGroup> {
    let device = parts.device;
    if !ARENA_SLOT.is_multiple_of(device.params_alignment()) {
        let need = device.params_alignment();
        return Err(BackendError::Unsupported(format!("uniform offsets aligned to {need}")));
    }
    let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
    let size = (bytes.len() as u64).max(ARENA_SLOT);
    let arena = device.buffer("kernel parameters", size, usage)?;
    device.write(&arena, 0, bytes);
    device.scoped("the parameters' bind group", 0, |wgpu| {
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
    })
}

/// The state while a plan is made.
struct Builder<'a> {
    parts: &'a Parts<'a>,
    arena: Arena,
    /// Vectors that were joined into one buffer.
    joined: BTreeMap<Place, wgpu::Buffer>,
}

impl Builder<'_> {
    /// The step of a single token, lowered and bound.
    fn token(
        &mut self,
        buffers: &DecodeBuffers,
        lower: Lower<'_>,
    ) -> Result<Option<TokenSteps<Dispatch, wgpu::Buffer>>> {
        let Parts { device, graph, experts, spill, .. } = *self.parts;
        let layers = || (0..).map(MoeId).take(graph.moe.len());
        let area = |moe| spill.is_some_and(|spill| spill.area(moe).is_some());
        let fetches: Vec<bool> = layers().map(area).collect();
        let mut fuse = Fuse {
            lower: Lower { batch: 1, cooperative: None, halved: None, ..lower },
            team: device.team(),
            layout: &buffers.layout,
            homes: &experts.homes(graph),
            fetches: &fetches,
            many: false,
            moved: None,
        };
        let Some(TokenSteps { steps, layers, tail }) = fuse.token()? else { return Ok(None) };
        let layers = layers.into_iter().map(|Points { resume, aside, routed }| {
            let aside = aside
                .into_iter()
                .map(|Aside { of, at, bytes }| Ok(Aside { of: self.resolve(of)?, at, bytes }));
            Ok(Points { resume, aside: aside.collect::<Result<_>>()?, routed })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Some(TokenSteps { steps: self.bind(&steps)?, layers, tail }))
    }

    /// Binds recipes to their buffers.
    fn bind(&mut self, recipes: &[Recipe]) -> Result<Vec<Dispatch>> {
        recipes.iter().map(|recipe| self.make(recipe)).collect()
    }

    fn make(&mut self, recipe: &Recipe) -> Result<Dispatch> {
        let Recipe { kernel, params, rows, grid, when, storage } = recipe;
        let device = self.parts.device;
        let pipeline = device.pipelines().get(device, kernel)?;
        let storage = storage.iter().map(|place| self.resolve(*place));
        let storage = storage.collect::<Result<Vec<_>>>()?;
        let storage = pipeline.bind(device, &storage.iter().collect::<Vec<_>>())?;
        let params = self.arena.push(params);
        Ok(Dispatch { pipeline, storage, params, rows: *rows, grid: *grid, when: when.clone() })
    }

    fn resolve(&mut self, place: Place) -> Result<wgpu::Buffer> {
        let Place::Biases(ids) = place else { return self.parts.resolve(place).cloned() };
        if let Some(buffer) = self.joined.get(&place) {
            return Ok(buffer.clone());
        }
        let Parts { device, graph, weights, .. } = *self.parts;
        let buffer = weights::join(device, graph, weights, &ids)?;
        self.joined.insert(place, buffer.clone());
        Ok(buffer)
    }
}

impl Parts<'_> {
    fn resolve(&self, place: Place) -> Result<&wgpu::Buffer> {
        let buffers = self.buffers;
        if let Some(buffer) = self.rows.and_then(|rows| rows.get(place)) {
            return Ok(buffer);
        }
        Ok(match place {
            Place::Tokens => &buffers.tokens,
            Place::Activation(buf) => buffers.activation(buf),
            Place::Keys(kv) => &buffers.kv(kv).keys,
            Place::Values(kv) => &buffers.kv(kv).values,
            Place::Recurrent(state) => buffers.recurrent.of(state),
            Place::RecurrentSlot => buffers.recurrent.slot(),
            Place::BlockTable => &buffers.blocks,
            Place::RopeTable(rope) => buffers.rope(rope),
            Place::Ids(moe) => &buffers.routing(moe).ids,
            Place::RoutingWeights(moe) => &buffers.routing(moe).weights,
            Place::PairInner => &buffers.pair_inner,
            Place::PairOutputs => &buffers.pair_outputs,
            Place::PairOrder => &buffers.pair_order,
            Place::PairTiles => &buffers.pair_tiles,
            Place::Halves => &buffers.halves,
            Place::Scales => &buffers.scales,
            Place::Parts => &buffers.parts,
            Place::Logits => &buffers.logits,
            Place::Empty => &buffers.empty,
            Place::Vector(id) => weights::vector(self.graph, self.weights, id)?,
            Place::RowRange(id, index) => {
                &weights::matrix(self.graph, self.weights, id)?[index].buffer
            }
            Place::Slots(chunk) => &self.experts.chunks[chunk].buffer,
            Place::Table(moe) => {
                let table = self.experts.table(usize::from(moe.0));
                table.ok_or_else(|| refused("experts without slots".into()))?
            }
            Place::Spill(moe) => {
                let area = self.spill.and_then(|spill| spill.area(moe));
                area.ok_or_else(|| refused("experts without an area in host memory".into()))?
            }
            token => {
                let buffer = self.decode.and_then(|decode| decode.get(token));
                buffer.ok_or_else(|| refused(format!("{token:?} outside of a token")))?
            }
        })
    }
}
