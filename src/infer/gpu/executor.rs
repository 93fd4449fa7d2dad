//! [`Backend`] on a device: replays the plan.
//!
//! Work is queued. A submission (one encoder, one compute pass) is made at the end of each `run`,
//! and before a write that would change what a queued dispatch reads. So a MoE layer whose experts
//! all have slots costs one submission: its experts, their sum, and everything up to the next
//! routing.

use std::ops::Range;
use std::sync::Arc;

use wgpu::BufferUsages;

use super::buffers::{Buffers, KvCache, elements};
use super::decode::{self, Decode, RowBuffers, Together};
use super::device::GpuDevice;
use super::experts::{Experts, SlotShape};
use super::kernels;
use super::lower::{self, Place};
use super::params::Step as StepParams;
use super::plan::{Parts, Plan};
use super::readback::Readback;
use super::spill::Spill;
use super::timing::PassClock;
use super::weights::{self, DeviceWeight, Uploads};
use crate::backend::{
    Backend, BackendError, Capacity, Counters, Fed, KvFormat, LogitRows, Ops, Progress, Result,
    Row, Slot, SlotClass, Step, Taken, Want,
};
use crate::graph::{ExpertLayout, Graph, KvId, MatrixSpec, MoeId, Op, RopeId, WeightId};
use crate::kv::{self, BLOCK, BlockCopy};
use crate::sampler::Sampler;
use crate::walk::Walk;

/// Something queued for the next submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queued {
    Op(usize),
    /// An `Experts` op's wave over one chunk of slots.
    Wave {
        op: usize,
        chunk: usize,
    },
}

/// What the host knows about a MoE layer's routing in this step.
#[derive(Default)]
struct Routed {
    /// Chosen expert of each pair, once read back.
    ids: Option<Vec<u32>>,
    /// Whether a wave has run each expert.
    ran: Vec<bool>,
}

/// The current step.
#[derive(Default)]
struct Running {
    params: StepParams,
    /// Rows of logits still to be computed after those in `params`.
    logit_rows_left: u32,
    /// Logits read back so far, without the last rows.
    logits: Vec<u8>,
}

pub(super) struct GpuBackend {
    pub(super) device: GpuDevice,
    pub(super) graph: Arc<Graph>,
    pub(super) capacity: Capacity,
    pub(super) buffers: Buffers,
    /// The path on which each single token is one submission, if there is one.
    pub(super) decode: Option<Decode>,
    /// For each weight, whether it is read as a vector.
    vectors: Vec<bool>,
    weights: Vec<Option<DeviceWeight>>,
    pub(super) experts: Experts,
    /// Experts that lost their slots.
    pub(super) spill: Option<Spill>,
    uploads: Uploads,
    /// Made at the first step after the last weight or slot change.
    pub(super) plan: Option<Plan>,
    running: Running,
    routed: Vec<Routed>,
    queued: Vec<Queued>,
    /// Larger weights and slot classes are split. This is the device's limit; tests lower it.
    binding_bytes_max: u64,
    walk: Walk,
    /// The contents of the device's table of blocks.
    blocks: Vec<u32>,
    /// Elements clamped in the caches, as of the last report.
    pub(super) clamped: u64,
    /// The path on which several sequences share a step, once one has been asked for.
    pub(super) together: Option<Together>,
    /// Whether the graph has no such path.
    pub(super) apart: bool,
    /// Whether there are fewer slots than experts.
    pub(super) evicts: bool,
}

impl GpuBackend {
    /// Bytes of a block of one layer's keys, or of its values.
    fn cache_bytes(&self, kv: KvId) -> u64 {
        let one = Capacity { context: BLOCK, ..self.capacity };
        elements(&self.graph, one, Place::Keys(kv)).unwrap_or(0) as u64 * 4
    }

    pub fn new(device: GpuDevice, graph: Arc<Graph>, capacity: Capacity) -> Result<Self> {
        lower::check(&graph)?;
        let mut buffers = Buffers::new(&device, &graph, capacity)?;
        let mut decode = None;
        if device.fuses() {
            decode = Decode::new(&device, &graph, &buffers.blocks)?;
        }
        buffers.bytes += decode.as_ref().map_or(0, |decode| decode.buffers.bytes);
        Ok(Self {
            decode,
            vectors: weights::vectors(&graph),
            weights: graph.weights.iter().map(|_| None).collect(),
            routed: graph.moe.iter().map(|_| Routed::default()).collect(),
            experts: Experts::default(),
            spill: None,
            uploads: Uploads::default(),
            plan: None,
            running: Running::default(),
            queued: Vec::new(),
            binding_bytes_max: device.binding_bytes_max(),
            walk: Walk::new(&graph),
            blocks: (0..kv::blocks(capacity.context) as u32).collect(),
            clamped: 0,
            together: None,
            apart: false,
            evicts: false,
            device,
            graph,
            capacity,
            buffers,
        })
    }

    /// The MoE layer of the `Experts` op at `op`.
    fn moe_of(&self, op: usize) -> Result<MoeId> {
        match self.graph.ops.get(op) {
            Some(Op::Experts { moe, .. }) => Ok(*moe),
            other => Err(BackendError::Unsupported(format!("op {op} is {other:?}, not Experts"))),
        }
    }

    pub(super) fn make_plan(&mut self) -> Result<()> {
        let grown = self.spill.as_mut().is_some_and(Spill::has_grown);
        if grown && self.decode.is_some() {
            // The old plan lacks the fetches from the new areas and must not run, even if the next
            // one cannot be made.
            self.forget_plan();
        }
        if self.plan.is_none() {
            if let Some(decode) = &mut self.decode {
                decode.forget_recorded();
            }
            self.forget_plan();
            self.gather()?;
            let plan = Plan::new(&self.parts(None))?;
            if plan.decode.is_none() {
                self.decode = None;
            }
            self.plan = Some(plan);
            self.device.pipelines().save();
        }
        Ok(())
    }

    /// Call before what plans refer to is changed.
    fn forget_plan(&mut self) {
        self.plan = None;
        if let Some(together) = &mut self.together {
            together.plan = None;
        }
    }

    /// What a plan is made from.
    pub(super) fn parts<'a>(&'a self, rows: Option<&'a RowBuffers>) -> Parts<'a> {
        Parts {
            device: &self.device,
            graph: &self.graph,
            buffers: &self.buffers,
            weights: &self.weights,
            experts: &self.experts,
            spill: self.spill.as_ref(),
            kv: self.capacity.kv,
            decode: self.decode.as_ref().map(|decode| &decode.buffers),
            batch: self.capacity.batch,
            rows,
        }
    }

    /// Moves weights that fused dispatches read together into one buffer, if a binding can hold
    /// them.
    fn gather(&mut self) -> Result<()> {
        if self.decode.is_none() {
            return Ok(());
        }
        let (most, reduction) = (self.binding_bytes_max, self.device.pipelines().reduction);
        for group in decode::together(&self.graph, reduction, self.capacity.kv == KvFormat::F16) {
            weights::gather(&self.device, &mut self.weights, &group, most)?;
        }
        Ok(())
    }

    /// Submits pending copies of experts, if there are any.
    fn copy_spilled(&mut self) -> Result<()> {
        if let Some(spill) = self.spill.as_mut().filter(|spill| spill.waits()) {
            let label = Some("experts set aside");
            let wgpu = self.device.wgpu();
            let mut encoder =
                wgpu.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            spill.encode(&mut encoder);
            self.device.submit(encoder)?;
        }
        Ok(())
    }

    /// Submits what is queued: one compute pass, then copies of what the host will read.
    fn submit(&mut self) -> Result<()> {
        if self.queued.is_empty() {
            return Ok(());
        }
        let queued = std::mem::take(&mut self.queued);
        let Some(plan) = &self.plan else {
            return Err(BackendError::Unsupported("a step that was never begun".into()));
        };
        let label = Some("step");
        let mut encoder =
            self.device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        if let Some(spill) = &mut self.spill {
            spill.encode(&mut encoder);
        }
        {
            let clock = self.device.meter().pass();
            let timestamp_writes = clock.as_ref().map(PassClock::writes);
            let mut pass = encoder
                .begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes });
            for item in &queued {
                let dispatches = match *item {
                    Queued::Op(op) => plan.ops[op].as_slice(),
                    Queued::Wave { op, chunk } => match &plan.waves[op][chunk] {
                        Some(wave) => wave.as_slice(),
                        None => &[],
                    },
                };
                for dispatch in dispatches {
                    let params = &self.running.params;
                    let count = plan.encode(&self.device, &mut pass, dispatch, params)?;
                    self.device.meter().dispatched(count);
                }
            }
        }
        let params = self.running.params;
        let mut chosen = None;
        let mut logit_bytes = None;
        for item in &queued {
            let Queued::Op(op) = *item else { continue };
            match self.graph.ops[op] {
                Op::Route { moe, .. } => {
                    let routing = &mut self.buffers.routing[usize::from(moe.0)];
                    let top_k = self.graph.moe_spec(moe).top_k;
                    let bytes = u64::from(params.tokens) * top_k as u64 * 4;
                    routing.readback.copy(&self.device, &mut encoder, &routing.ids, bytes)?;
                    chosen.get_or_insert_with(Vec::new).push((moe, bytes));
                }
                Op::Logits { .. } | Op::States { .. } => {
                    let width = self.graph.result_width() as u64;
                    let bytes = u64::from(params.logit_rows) * width * 4;
                    let Buffers { logits: from, blocks, logits_readback, .. } = &mut self.buffers;
                    logits_readback.copy_with(&self.device, &mut encoder, from, bytes, blocks)?;
                    logit_bytes = Some(bytes);
                }
                _ => {}
            }
        }
        let submission = self.device.submit(encoder)?;
        for (moe, bytes) in chosen.into_iter().flatten() {
            self.buffers.routing[usize::from(moe.0)].readback.submitted(bytes, &submission);
        }
        if let Some(bytes) = logit_bytes {
            self.buffers.logits_readback.submitted(bytes + 4, &submission);
        }
        Ok(())
    }

    /// Waits for the logits in flight, and for the number of clamped elements up to then.
    fn take_logits(&mut self) -> Result<Vec<u8>> {
        let mut bytes = self.buffers.logits_readback.take(&self.device)?.unwrap_or_default();
        if let Some(at) = bytes.len().checked_sub(4) {
            let clamped: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes.split_off(at));
            self.clamped = u64::from(clamped[0]);
        }
        Ok(bytes)
    }

    /// Runs the `Logits` op, some rows at a time. The last rows stay in flight.
    fn run_logits(&mut self, op: usize) -> Result<()> {
        if self.running.params.logit_rows == 0 {
            return Ok(());
        }
        self.queued.push(Queued::Op(op));
        self.submit()?;
        while self.running.logit_rows_left > 0 {
            let piece = self.take_logits()?;
            self.running.logits.extend(piece);
            let params = &mut self.running.params;
            params.logit_start += params.logit_rows;
            params.logit_rows = self.running.logit_rows_left.min(to_u32(self.buffers.logit_rows));
            self.running.logit_rows_left -= params.logit_rows;
            self.device.write(&self.buffers.step, 0, bytemuck::bytes_of(params));
            self.queued.push(Queued::Op(op));
            self.submit()?;
        }
        Ok(())
    }

    fn check_step(&self, step: &Step<'_>) -> Result<()> {
        let Capacity { batch, context, .. } = self.capacity;
        let refuse = |what| Err(BackendError::Unsupported(what));
        let count = step.tokens.len();
        if count == 0 || count > batch {
            return refuse(format!("a step of {count} tokens where 1 to {batch} fit"));
        }
        if step.position.checked_add(count).is_none_or(|end| end > context) {
            let position = step.position;
            return refuse(format!("{count} tokens at {position} in a context of {context}"));
        }
        match step.tokens.iter().find(|token| !self.graph.admits(**token)) {
            Some(token) => refuse(format!("token {token} of a vocabulary of {}", self.graph.vocab)),
            None => Ok(()),
        }
    }
}

impl Backend for GpuBackend {
    fn describe(&self) -> String {
        self.device.describe()
    }

    fn weight_bytes(&self, spec: &MatrixSpec) -> u64 {
        weights::device_bytes(spec)
    }

    fn slot_bytes(&self, layout: &ExpertLayout) -> u64 {
        SlotShape::of(layout).stride as u64
    }

    fn fixed_bytes(&self) -> u64 {
        self.buffers.bytes
    }

    fn load_weight(&mut self, id: WeightId, spec: &MatrixSpec, bytes: &[u8]) -> Result<()> {
        let index = id.0 as usize;
        // Old contents are freed first, so that a reload needs no room for a second copy.
        self.forget_plan();
        let name = self.graph.weight_spec(id).tensor.as_str();
        let vector = self.vectors[index];
        self.weights[index] = None;
        let Self { device, uploads, .. } = self;
        let loaded = if vector {
            weights::load_vector(device, uploads, name, spec, bytes)?
        } else {
            let most = self.binding_bytes_max;
            weights::load_matrix(device, uploads, name, spec, bytes, most)?
        };
        self.weights[index] = Some(loaded);
        Ok(())
    }

    fn adapt(&mut self, graph: Arc<Graph>) -> Result<()> {
        self.queued.clear();
        self.forget_plan();
        self.forget_together();
        let Self { device, buffers, decode, .. } = self;
        buffers.adapt(device, &graph, self.capacity)?;
        if let Some(decode) = decode {
            let before = decode.buffers.bytes;
            decode.buffers.adapt(device, &graph)?;
            buffers.bytes = buffers.bytes - before + decode.buffers.bytes;
        }
        self.weights.resize_with(graph.weights.len(), || None);
        self.vectors = weights::vectors(&graph);
        self.walk = Walk::new(&graph);
        self.graph = graph;
        Ok(())
    }

    fn alloc_slots(&mut self, classes: &[SlotClass], class_of: &[u16]) -> Result<()> {
        self.forget_plan();
        self.spill = None;
        self.experts = Experts::default();
        let layers = || class_of.iter().zip(&self.graph.moe);
        let of = |class: usize| layers().filter(move |(of, _)| usize::from(**of) == class);
        let wanted = |class| of(class).map(|(_, moe)| moe.experts.len()).sum::<usize>();
        self.evicts = classes.iter().enumerate().any(|(class, slots)| slots.count < wanted(class));
        let most = self.binding_bytes_max;
        let made = Experts::alloc(&self.device, &self.graph, classes, class_of, most);
        if made.is_err() {
            // Frees what was allocated before a smaller number is tried.
            self.device.flush()?;
        }
        self.experts = made?;
        Ok(())
    }

    fn class_bytes_max(&self) -> u64 {
        self.binding_bytes_max
    }

    fn grow(&mut self, blocks: usize) -> Result<()> {
        self.forget_plan();
        let capacity = Capacity { context: blocks * BLOCK, ..self.capacity };
        self.buffers.grow(&self.device, &self.graph, capacity)?;
        self.capacity = capacity;
        Ok(())
    }

    fn block_bytes(&self) -> u64 {
        let one = Capacity { context: BLOCK, ..self.capacity };
        let kv = (0..self.graph.kv.len() as u16).map(|i| Place::Keys(KvId(i)));
        let ropes = (0..self.graph.ropes.len() as u8).map(|i| Place::RopeTable(RopeId(i)));
        let words = |place| elements(&self.graph, one, place).unwrap_or(0) as u64;
        8 * kv.map(words).sum::<u64>() + 4 * ropes.map(words).sum::<u64>()
    }

    fn class(&self) -> String {
        let (device, format) = (self.device.describe(), self.capacity.kv);
        format!("{device} {format:?} {}", *kernels::ALL)
    }

    fn stored_bytes(&self) -> u64 {
        2 * (0..self.graph.kv.len() as u16).map(|i| self.cache_bytes(KvId(i))).sum::<u64>()
    }

    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        let bytes = self.stored_bytes();
        let mut out = Readback::new(&self.device, "a block that is read", bytes)?;
        let label = Some("a block is read");
        let wgpu = self.device.wgpu();
        let mut encoder = wgpu.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        let mut at = 0;
        for i in (0..self.graph.kv.len() as u16).map(KvId) {
            let (bytes, KvCache { keys, values }) = (self.cache_bytes(i), self.buffers.kv(i));
            for of in [keys, values] {
                out.copy_part(&mut encoder, of, u64::from(block) * bytes, at, bytes);
                at += bytes;
            }
        }
        let submission = self.device.submit(encoder)?;
        out.submitted(bytes, &submission);
        let lost = || BackendError::Lost("a block was not read".to_owned());
        out.take(&self.device)?.ok_or_else(lost)
    }

    fn write_block(&mut self, block: u32, mut bytes: &[u8]) -> Result<()> {
        for i in (0..self.graph.kv.len() as u16).map(KvId) {
            let (len, KvCache { keys, values }) = (self.cache_bytes(i), self.buffers.kv(i));
            for of in [keys, values] {
                let (now, rest) = bytes.split_at(len as usize);
                self.device.write(of, u64::from(block) * len, now);
                bytes = rest;
            }
        }
        Ok(())
    }

    fn copy_block(&mut self, copy: BlockCopy) -> Result<()> {
        let label = Some("a block is copied");
        let wgpu = self.device.wgpu();
        let mut encoder = wgpu.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        let layers = (0..self.graph.kv.len() as u16).map(KvId);
        let bytes = |i| self.cache_bytes(i);
        // WebGPU cannot copy within a buffer.
        let usage = BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let most = layers.clone().map(bytes).max().unwrap_or(0);
        let between = self.device.buffer("a block being copied", most, usage)?;
        for i in layers {
            let bytes = bytes(i);
            let (from, to) = (u64::from(copy.from) * bytes, u64::from(copy.to) * bytes);
            let KvCache { keys, values } = self.buffers.kv(i);
            for of in [keys, values] {
                encoder.copy_buffer_to_buffer(of, from, &between, 0, Some(bytes));
                encoder.copy_buffer_to_buffer(&between, 0, of, to, Some(bytes));
            }
        }
        self.device.submit(encoder)?;
        Ok(())
    }

    fn set_blocks(&mut self, blocks: &[u32]) {
        let same = self.blocks.iter().zip(blocks).take_while(|(a, b)| a == b).count();
        if same < blocks.len() {
            let at = 4 + same as u64 * 4;
            self.device.write(&self.buffers.blocks, at, bytemuck::cast_slice(&blocks[same..]));
        }
        blocks.clone_into(&mut self.blocks);
    }

    fn state_bytes(&self) -> u64 {
        self.buffers.recurrent.slot_bytes(&self.graph)
    }

    fn grow_states(&mut self, count: usize) -> Result<()> {
        self.forget_plan();
        let before = self.buffers.recurrent.bytes();
        let grown = self.buffers.recurrent.grow(&self.device, &self.graph, count);
        self.buffers.bytes = self.buffers.bytes - before + self.buffers.recurrent.bytes();
        grown
    }

    fn copy_state(&mut self, copy: BlockCopy) -> Result<()> {
        self.buffers.recurrent.copy(&self.device, &self.graph, copy)
    }

    fn set_state(&mut self, slot: u32) {
        self.buffers.recurrent.set(&self.device, slot);
    }

    fn clamped(&self) -> u64 {
        self.clamped + self.together.as_ref().map_or(0, |together| together.clamped)
    }

    fn room(&self) -> usize {
        if self.decode.is_some() { self.tokens_room() } else { 1 }
    }

    fn choose(&mut self, sampler: &Sampler) -> Result<bool> {
        self.make_plan()?;
        self.choose_on_device(sampler)
    }

    fn brings(&self) -> bool {
        self.spill.is_some() && self.decode.is_some()
    }

    fn set_stretched(&mut self, long: bool) -> Result<()> {
        self.submit()?;
        self.buffers.stretch(&self.device, long)
    }

    fn offer(&mut self, free: &[Slot]) {
        self.offer_slots(free);
    }

    fn queue(&mut self, fed: Fed<'_>, position: usize, want: Want) -> Result<()> {
        self.make_plan()?;
        self.row_logits();
        match (fed, want) {
            (Fed::Tokens(&[_]) | Fed::Chosen, _) if self.decode.is_some() => {
                self.submit_token(fed, position, want)
            }
            (Fed::Tokens(tokens), Want::Logits(logits)) => {
                self.begin(&Step { tokens, position, logits })?;
                self.walk.start();
                Ok(())
            }
            _ => Err(BackendError::Unsupported(
                "choosing tokens of a graph that is not fused".into(),
            )),
        }
    }

    fn advance(&mut self, guess: bool) -> Result<Progress> {
        if self.decode.as_ref().is_some_and(Decode::in_flight) {
            return Ok(Progress::Report(self.take_report()?));
        }
        if let Some(report) = self.take_rows()? {
            return Ok(Progress::Report(report));
        }
        let mut walk = std::mem::take(&mut self.walk);
        let progress = walk.advance(self, guess);
        self.walk = walk;
        progress
    }

    fn run_wave(&mut self, slots: &[Option<Slot>]) -> Result<()> {
        let op = self.walk.waits()?;
        self.run_experts(op, slots)
    }

    fn resume(&mut self, moe: MoeId) -> Result<()> {
        if self.resume_rows()? {
            return Ok(());
        }
        self.resume_token(moe)
    }

    fn give_up(&mut self) {
        self.queued.clear();
        self.drop_tokens();
        self.drop_rows();
    }

    fn rows_max(&self) -> usize {
        self.rows_together()
    }

    fn rows_room(&self) -> usize {
        Self::rows_room(self)
    }

    fn choose_rows(&mut self, samplers: &[&Sampler]) -> Result<bool> {
        self.choose_for_rows(samplers)
    }

    fn queue_rows(&mut self, rows: &[Row<'_>], taken: Taken, want: Want) -> Result<()> {
        self.submit_rows(rows, taken, want)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        if let Some(logits) = self.row_logits() {
            return Ok(logits);
        }
        self.submit()?;
        let last = self.take_logits()?;
        let mut bytes = std::mem::take(&mut self.running.logits);
        bytes.extend(last);
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn profile(&mut self, token: u32, position: usize) -> Result<Vec<(&'static str, f64)>> {
        self.make_plan()?;
        self.profile_token(token, position)
    }

    fn counters(&self) -> Counters {
        self.device.counters()
    }

    fn set_aside(&mut self, bytes: u64) {
        self.spill = Spill::new(&self.device, &self.graph, &self.experts, bytes);
    }

    fn bring(&mut self, moe: MoeId, expert: u32, slot: Slot) -> Result<bool> {
        let Some(to) = self.experts.locate(slot) else { return Ok(false) };
        // A queued wave still reads the slot's old contents.
        if self.queued.iter().any(|q| matches!(q, Queued::Wave { .. })) {
            self.submit()?;
        }
        let bytes = to.2;
        let brought = self.spill.as_mut().is_some_and(|spill| spill.bring((moe, expert), to));
        if brought {
            self.device.meter().uploaded(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        Ok(brought)
    }

    fn place(&mut self, moe: MoeId, expert: u32, slot: Option<Slot>) {
        if let Some(spill) = &mut self.spill {
            match slot {
                Some(slot) => spill.entered(moe, expert, slot),
                None => {
                    spill.left(&self.device, (moe, expert), |slot| self.experts.locate(slot));
                }
            }
        }
        let mut table = self.decode.as_mut().map(|decode| &mut decode.buffers.table);
        if let Some(table) = &mut table {
            table.place(moe, expert, slot);
        }
        for (moe, expert, place) in self.spill.iter_mut().flat_map(Spill::moves) {
            if let Some(table) = &mut table {
                table.shelve(moe, expert, place);
            }
        }
    }

    fn fill_slot(&mut self, slot: Slot, bytes: &[u8]) -> Result<()> {
        // A queued wave still reads the slot's old contents.
        if self.queued.iter().any(|q| matches!(q, Queued::Wave { .. })) {
            self.submit()?;
        }
        // A write takes effect before the next submission, so copies of the slot's old contents
        // must be submitted first.
        self.copy_spilled()?;
        self.experts.fill(&self.device, &mut self.uploads, slot, bytes)
    }
}

impl Ops for GpuBackend {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        self.check_step(step)?;
        // Left over from a step that was abandoned.
        self.queued.clear();
        self.make_plan()?;
        let tokens = to_u32(step.tokens.len());
        let (logit_start, wanted) = match step.logits {
            LogitRows::None => (0, 0),
            LogitRows::Last => (tokens - 1, 1),
            LogitRows::All => (0, tokens),
        };
        let logit_rows = wanted.min(to_u32(self.buffers.logit_rows));
        let position = to_u32(step.position);
        self.running = Running {
            params: StepParams { tokens, position, logit_start, logit_rows },
            logit_rows_left: wanted - logit_rows,
            logits: Vec::new(),
        };
        for routed in &mut self.routed {
            *routed = Routed::default();
        }
        self.device.write(&self.buffers.step, 0, bytemuck::bytes_of(&self.running.params));
        self.device.write(&self.buffers.tokens, 0, bytemuck::cast_slice(step.tokens));
        Ok(())
    }

    fn run(&mut self, ops: Range<usize>) -> Result<()> {
        for op in ops {
            match self.graph.ops.get(op) {
                Some(Op::Logits { .. } | Op::States { .. }) => self.run_logits(op)?,
                Some(Op::Experts { .. }) | None => {
                    return Err(BackendError::Unsupported(format!("running op {op} by itself")));
                }
                Some(_) => self.queued.push(Queued::Op(op)),
            }
        }
        self.submit()
    }

    fn routing(&mut self, op: usize) -> Result<Vec<u32>> {
        let moe = self.moe_of(op)?;
        let index = usize::from(moe.0);
        if let Some(ids) = &self.routed[index].ids {
            return Ok(ids.clone());
        }
        let readback = &mut self.buffers.routing[index].readback;
        let bytes = readback.take(&self.device)?.ok_or_else(|| {
            BackendError::Unsupported(format!("op {op} before its Route was run"))
        })?;
        let ids: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        let experts = self.graph.moe_spec(moe).experts.len();
        if let Some(id) = ids.iter().find(|id| **id as usize >= experts) {
            return Err(BackendError::Lost(format!("it chose expert {id} of {experts}")));
        }
        self.routed[index].ran = vec![false; experts];
        self.routed[index].ids = Some(ids.clone());
        Ok(ids)
    }

    fn run_experts(&mut self, op: usize, slots: &[Option<Slot>]) -> Result<()> {
        let moe = self.moe_of(op)?;
        let index = usize::from(moe.0);
        let experts = self.graph.moe_spec(moe).experts.len();
        if slots.len() != experts {
            let given = slots.len();
            return Err(BackendError::Unsupported(format!("{given} slots for {experts} experts")));
        }
        let rows = self.experts.wave(slots)?;
        if rows.is_empty() {
            return Ok(());
        }
        if !self.experts.table_holds(index, &rows) {
            // A queued wave of this layer still reads the old table.
            if self.queued.iter().any(|q| matches!(q, Queued::Wave { op: o, .. } if *o == op)) {
                self.submit()?;
            }
            self.experts.write_table(&self.device, index, rows.clone());
        }
        let routed = &mut self.routed[index];
        for (ran, slot) in routed.ran.iter_mut().zip(slots) {
            *ran |= slot.is_some();
        }
        let chosen = |row: &[u32]| match &routed.ids {
            Some(ids) => ids.iter().any(|id| row[*id as usize] != super::experts::EMPTY),
            None => row.iter().any(|slot| *slot != super::experts::EMPTY),
        };
        let Some(plan) = &self.plan else {
            return Err(BackendError::Unsupported("experts before the step was begun".into()));
        };
        for (chunk, row) in rows.iter().enumerate() {
            if !chosen(row) {
                continue;
            }
            if plan.waves[op][chunk].is_none() {
                let layer = self.graph.moe_spec(moe).layer;
                let what = format!("an expert of layer {layer} in a slot of another shape");
                return Err(BackendError::Unsupported(what));
            }
            self.queued.push(Queued::Wave { op, chunk });
        }
        Ok(())
    }

    fn finish_experts(&mut self, op: usize) -> Result<()> {
        let moe = self.moe_of(op)?;
        let routed = &self.routed[usize::from(moe.0)];
        let ids = routed.ids.as_deref().unwrap_or_default();
        if let Some(id) = ids.iter().find(|id| !routed.ran[**id as usize]) {
            let layer = self.graph.moe_spec(moe).layer;
            let what = format!("layer {layer}'s sum before expert {id} was run");
            return Err(BackendError::Unsupported(what));
        }
        self.queued.push(Queued::Op(op));
        Ok(())
    }
}

/// A step's sizes are bounded by buffers whose sizes fit u32.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("a batch and a context below 2^32")
}

#[cfg(test)]
impl GpuBackend {
    /// Splits weights and slots as on a device with smaller bindings.
    pub(super) fn limit(&mut self, binding_bytes_max: u64, logit_rows: usize) {
        self.binding_bytes_max = binding_bytes_max;
        self.buffers.logit_rows = logit_rows;
    }

    /// Overwrites `rows` rows of an activation buffer.
    pub(super) fn set(&self, buf: crate::graph::Buf, values: &[f32]) {
        let width = self.graph.width(buf);
        let stride = super::buffers::stride(width) * 4;
        for (row, values) in values.chunks_exact(width).enumerate() {
            let at = (row * stride) as u64;
            self.device.write(self.buffers.activation(buf), at, bytemuck::cast_slice(values));
        }
    }

    /// The first `rows` rows of an activation buffer. The padding must be zero.
    pub(super) fn get(&self, buf: crate::graph::Buf, rows: usize) -> Vec<f32> {
        let width = self.graph.width(buf);
        let stride = super::buffers::stride(width);
        let all = self.read(self.buffers.activation(buf), rows * stride);
        let (mut kept, mut padding) = (Vec::new(), Vec::new());
        for row in all.chunks_exact(stride) {
            kept.extend_from_slice(&row[..width]);
            padding.extend_from_slice(&row[width..]);
        }
        assert!(padding.iter().all(|v| *v == 0.0), "padding was written");
        kept
    }

    /// The routing weights of a MoE layer's first `pairs` choices.
    pub(super) fn routing_weights(&self, moe: usize, pairs: usize) -> Vec<f32> {
        self.read(&self.buffers.routing[moe].weights, pairs)
    }

    /// The last layer's pairs grouped by expert, and all tiles.
    pub(super) fn grouped(&self, pairs: usize) -> (Vec<u32>, Vec<u32>) {
        let Buffers { pair_order, pair_tiles, .. } = &self.buffers;
        (self.read(pair_order, pairs), self.read(pair_tiles, pair_tiles.size() as usize / 4))
    }

    /// The last halved rows, in words, and their scales.
    pub(super) fn halved(&self, rows: usize, words: usize) -> (Vec<u32>, Vec<f32>) {
        (self.read(&self.buffers.halves, words), self.read(&self.buffers.scales, rows))
    }

    /// Elements clamped in the caches so far.
    pub(super) fn clamped_now(&self) -> u32 {
        self.read(&self.buffers.blocks, 1)[0]
    }

    /// The first words of a layer's cache: keys, values.
    pub(super) fn cached(&self, kv: crate::graph::KvId, words: usize) -> (Vec<u32>, Vec<u32>) {
        let cache = self.buffers.kv(kv);
        (self.read(&cache.keys, words), self.read(&cache.values, words))
    }

    fn read<T: bytemuck::Pod>(&self, buffer: &wgpu::Buffer, elements: usize) -> Vec<T> {
        let bytes = elements as u64 * 4;
        let mut readback =
            super::readback::Readback::new(&self.device, "a test's buffer", bytes).unwrap();
        let mut encoder = self.device.wgpu().create_command_encoder(&Default::default());
        readback.copy(&self.device, &mut encoder, buffer, bytes).unwrap();
        let submission = self.device.submit(encoder).unwrap();
        readback.submitted(bytes, &submission);
        bytemuck::pod_collect_to_vec(&readback.take(&self.device).unwrap().unwrap())
    }
}
