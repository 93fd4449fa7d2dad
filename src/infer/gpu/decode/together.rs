//! A step of one token of each of several sequences, as one submission: the list of dispatches of a
//! token, made for rows. Each row has its position and its list of blocks.
//!
//! A row's result has the same bits as a token of its own: norms, attention and packing compute each
//! row as they compute one, and products keep the parts and the order of a row's sum
//! (rewrites/together.rs). Refused are graphs with an op that depends on the position or on a state
//! and that no rewrite matches; their sequences run one after another.
//!
//! Experts need as many slots as there are. Each row chooses its own. If one of them has no slot yet,
//! the step halts at that layer; the host fills the slots that the rows miss there, and the step runs
//! again from its beginning, which writes the same keys and values again. Since no expert ever loses
//! its slot, it comes further each time. Whatever a step reads is written when it is submitted, the
//! first time and again: what a step that halts leaves, and what one queued behind it leaves, is
//! garbage.

use std::collections::{BTreeMap, VecDeque};

use wgpu::BufferUsages;

use super::buffers::{elements, moved};
use super::layout::Layout;
use crate::backend::{BackendError, Capacity, Report, Result, Row, Taken, Want};
use crate::gpu::device::GpuDevice;
use crate::gpu::executor::GpuBackend;
use crate::gpu::lower::Place;
use crate::gpu::params::{Step, Steps};
use crate::gpu::plan::RowsPlan;
use crate::gpu::readback::Readback;
use crate::gpu::sample::{Links, SamplePlan, TOKEN_STRIDE};
use crate::gpu::timing::PassClock;
use crate::graph::{Buf, Graph, MoeId};
use crate::kv;
use crate::sampler::Sampler;

/// The most rows of a step (kernels/shared/together.wgsl).
pub(in crate::gpu) const ROWS_MAX: usize = 16;

const STORAGE: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

/// f32s from one row of logits to the next, so that each can be bound by itself.
pub(in crate::gpu) const fn logits_stride(vocab: usize) -> usize {
    vocab.next_multiple_of(64)
}

/// The buffers that take the place of a token's.
pub(in crate::gpu) struct RowBuffers {
    made: BTreeMap<Place, wgpu::Buffer>,
    /// The rows' next tokens, [`TOKEN_STRIDE`] apart, as are those chosen.
    followers: wgpu::Buffer,
    /// Words from one row's list of blocks to the next.
    list_words: usize,
    bytes: u64,
}

impl RowBuffers {
    fn new(device: &GpuDevice, graph: &Graph, capacity: Capacity) -> Result<Self> {
        let layout = Layout::of(graph);
        let packed = (0..).map(|i| Place::Packed(Buf(i))).take(graph.buffers.len());
        let of_choices = [Place::PackedInner, Place::Routed, Place::Fetches, Place::State];
        let own = packed.chain(moved(graph)).chain([Place::Qkv, Place::Partial]).chain(of_choices);
        // Kernels may read two words behind a list (kernels/shared/blocks.wgsl).
        let list_words = kv::blocks(graph.context_max.max(capacity.context)) + 3;
        let words = [
            (Place::Tokens, 1),
            (Place::Logits, logits_stride(graph.vocab)),
            (Place::BlockTable, list_words),
            (Place::Chosen, TOKEN_STRIDE as usize / 4),
        ];
        let own = own.map(|place| (place, elements(graph, &layout, place).unwrap_or(0)));
        let (mut made, mut bytes) = (BTreeMap::new(), 0);
        for (place, words) in own.chain(words) {
            // One word more: the number of elements clamped in the caches.
            let words = words * ROWS_MAX + usize::from(place == Place::BlockTable);
            let buffer = device.buffer("rows of several sequences", words as u64 * 4, STORAGE)?;
            bytes += buffer.size();
            made.insert(place, buffer);
        }
        let followers =
            device.buffer("the rows' next tokens", ROWS_MAX as u64 * TOKEN_STRIDE, STORAGE)?;
        bytes += followers.size();
        Ok(Self { made, followers, list_words, bytes })
    }

    pub fn get(&self, place: Place) -> Option<&wgpu::Buffer> {
        self.made.get(&place)
    }

    fn of(&self, place: Place) -> &wgpu::Buffer {
        &self.made[&place]
    }
}

/// A step in flight.
#[derive(Debug, Clone, Copy)]
struct Flight {
    rows: usize,
    steps: Steps,
    /// The rows' tokens. `None`: those that the step before chose.
    tokens: Option<[u32; ROWS_MAX]>,
    /// Which readback it writes.
    readback: usize,
    /// Whether it chooses tokens, rather than returning logits.
    chooses: bool,
}

/// The most steps in flight at once.
const FLIGHTS_MAX: usize = 2;

/// The state of this path, for a graph that has it.
pub(in crate::gpu) struct Together {
    pub buffers: RowBuffers,
    /// Made anew with the plan of the backend.
    pub plan: Option<RowsPlan>,
    /// For each row, the list of blocks that the device has.
    lists: Vec<Vec<u32>>,
    /// One for each step in flight.
    readbacks: [Readback; FLIGHTS_MAX],
    /// The steps in flight, oldest first.
    flights: VecDeque<Flight>,
    next: usize,
    /// The step that waits for experts.
    halted: Option<Flight>,
    /// The choice of each row's token.
    choosers: Vec<SamplePlan>,
    /// The logits of the last step.
    logits: Option<Vec<f32>>,
    /// Elements that this path clamped in the caches.
    pub clamped: u64,
}

impl Together {
    fn new(device: &GpuDevice, graph: &Graph, capacity: Capacity) -> Result<Self> {
        let buffers = RowBuffers::new(device, graph, capacity)?;
        let bytes = buffers.of(Place::Logits).size() + buffers.of(Place::State).size() + 4;
        let readback = || Readback::new(device, "the results of rows", bytes);
        Ok(Self {
            readbacks: [readback()?, readback()?],
            buffers,
            plan: None,
            lists: vec![Vec::new(); ROWS_MAX],
            flights: VecDeque::new(),
            next: 0,
            halted: None,
            choosers: Vec::new(),
            logits: None,
            clamped: 0,
        })
    }

    /// Tells the device which blocks the rows have. Returns where the rows are.
    fn place(&mut self, device: &GpuDevice, rows: &[Row<'_>]) -> Steps {
        let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut steps = Steps {
            tokens: word(rows.len()),
            position: word(rows.iter().map(|row| row.position).max().unwrap_or(0)),
            logit_start: 0,
            logit_rows: word(rows.len()),
            rows: [[0; 4]; ROWS_MAX / 2],
        };
        for (i, row) in rows.iter().enumerate() {
            let begin = i * self.buffers.list_words;
            steps.rows[i / 2][i % 2 * 2] = word(row.position);
            steps.rows[i / 2][i % 2 * 2 + 1] = word(begin);
            let list = &mut self.lists[i];
            let same = list.iter().zip(row.blocks).take_while(|(a, b)| a == b).count();
            if same < row.blocks.len() {
                let at = 4 * (1 + begin + same) as u64;
                let table = self.buffers.of(Place::BlockTable);
                device.write(table, at, bytemuck::cast_slice(&row.blocks[same..]));
            }
            row.blocks.clone_into(list);
        }
        steps
    }
}

impl GpuBackend {
    /// The most rows of a step. 1 if this graph's sequences run one after another.
    pub(in crate::gpu) fn rows_together(&self) -> usize {
        let fits = self.decode.is_some() && !self.apart && !self.evicts && self.spill.is_none();
        if fits { ROWS_MAX.min(self.capacity.batch) } else { 1 }
    }

    /// Call when the graph changes.
    pub(in crate::gpu) fn forget_together(&mut self) {
        let gone = self.together.take();
        self.buffers.bytes -= gone.map_or(0, |gone| gone.buffers.bytes);
        self.apart = false;
    }

    /// Makes what a step of several rows needs. `false` if the graph cannot have one.
    fn make_together(&mut self) -> Result<bool> {
        self.make_plan()?;
        if self.together.is_none() {
            let made = Together::new(&self.device, &self.graph, self.capacity)?;
            self.buffers.bytes += made.buffers.bytes;
            self.together = Some(made);
        }
        let Some(together) = &self.together else { return Ok(false) };
        if together.plan.is_none() {
            let plan = RowsPlan::new(&self.parts(Some(&together.buffers)))?;
            if plan.is_none() {
                self.forget_together();
                self.apart = true;
                return Ok(false);
            }
            if let Some(together) = &mut self.together {
                together.plan = plan;
            }
            self.device.pipelines().save();
        }
        Ok(true)
    }

    pub(in crate::gpu) fn choose_for_rows(&mut self, samplers: &[&Sampler]) -> Result<bool> {
        if samplers.len() > self.rows_together() || !self.make_together()? {
            return Ok(false);
        }
        let Self { device, together, graph, .. } = self;
        let Some(together) = together else { return Ok(false) };
        let Together { buffers, choosers, .. } = together;
        for (row, sampler) in samplers.iter().enumerate() {
            let known = choosers.get_mut(row);
            if let Some(chooser) = known
                && chooser.turn_to(device, graph.vocab, sampler)?
            {
                continue;
            }
            let links = Links {
                logits: buffers.of(Place::Logits),
                state: buffers.of(Place::State),
                tokens: &buffers.followers,
                chosen: buffers.of(Place::Chosen),
                row,
            };
            let made = match SamplePlan::new(device, graph.vocab, links, sampler) {
                Ok(made) => made,
                // The host chooses.
                Err(BackendError::Unsupported(_)) => return Ok(false),
                Err(error) => return Err(error),
            };
            match choosers.get_mut(row) {
                Some(chooser) => *chooser = made,
                None => choosers.push(made),
            }
        }
        Ok(true)
    }

    fn check_rows(&self, rows: &[Row<'_>]) -> Result<()> {
        let most = self.rows_together();
        let refuse = |what| Err(BackendError::Unsupported(what));
        if rows.is_empty() || rows.len() > most {
            return refuse(format!("a step of {} sequences where 1 to {most} fit", rows.len()));
        }
        for row in rows {
            let (token, context) = (row.token as usize, self.capacity.context);
            if token >= self.graph.vocab || row.position >= context {
                let position = row.position;
                return refuse(format!("token {token} at {position} in a context of {context}"));
            }
        }
        Ok(())
    }

    // Long: one submission, in the order in which the device sees it.
    pub(in crate::gpu) fn submit_rows(
        &mut self,
        rows: &[Row<'_>],
        taken: Taken,
        want: Want,
    ) -> Result<()> {
        self.check_rows(rows)?;
        let refuse = |what: &str| Err(BackendError::Unsupported(what.to_owned()));
        if !self.make_together()? {
            return refuse("rows of several sequences in this graph");
        }
        let Self { device, together, .. } = self;
        let Some(together) = together else { return refuse("rows that were not made") };
        let chooses = want == Want::Choice;
        if together.flights.len() == FLIGHTS_MAX || chooses && together.choosers.len() < rows.len()
        {
            return refuse("so many steps, or a choice without a sampler");
        }
        let steps = together.place(device, rows);
        let tokens = (taken == Taken::Rows).then(|| {
            let mut tokens = [0; ROWS_MAX];
            tokens.iter_mut().zip(rows).for_each(|(token, row)| *token = row.token);
            tokens
        });
        self.fly_rows(Flight { rows: rows.len(), steps, tokens, readback: 0, chooses })
    }

    /// Runs the step that halted again.
    pub(in crate::gpu) fn resume_rows(&mut self) -> Result<bool> {
        let halted = self.together.as_mut().and_then(|together| together.halted.take());
        let Some(flight) = halted else { return Ok(false) };
        self.make_together()?;
        self.fly_rows(flight)?;
        Ok(true)
    }

    // Long: one submission, in the order in which the device sees it.
    fn fly_rows(&mut self, flight: Flight) -> Result<()> {
        let refuse = |what: &str| Err(BackendError::Unsupported(what.to_owned()));
        let Self { device, together, buffers, decode, graph, .. } = self;
        let Some(together) = together else { return refuse("rows that were not made") };
        if let Some(decode) = decode {
            decode.buffers.table.flush(device);
        }
        let Flight { rows, steps, tokens, chooses, .. } = flight;
        device.write(&buffers.step, 0, bytemuck::bytes_of(&steps));
        let (count, position) = (steps.tokens, steps.position);
        let step = Step { tokens: count, position, logit_start: 0, logit_rows: count };
        let positions: Vec<u32> = (0..rows).map(|row| steps.rows[row / 2][row % 2 * 2]).collect();
        let Together { plan: Some(plan), choosers, readbacks, next, .. } = together else {
            return refuse("rows without a plan");
        };
        let label = Some("rows of several sequences");
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        let made = &together.buffers.made;
        match tokens {
            Some(tokens) => {
                device.write(&made[&Place::Tokens], 0, bytemuck::cast_slice(&tokens[..rows]));
            }
            // A step that halted has changed none of them.
            None => {
                for row in 0..rows as u64 {
                    let (chosen, to) = (&together.buffers.followers, &made[&Place::Tokens]);
                    encoder.copy_buffer_to_buffer(chosen, row * TOKEN_STRIDE, to, row * 4, Some(4));
                }
            }
        }
        {
            let clock = device.meter().pass();
            let timestamp_writes = clock.as_ref().map(PassClock::writes);
            let mut pass = encoder
                .begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes });
            let mut dispatches = plan.encode(device, &mut pass, (&step, &positions))?;
            let choosers = if chooses { &choosers[..rows] } else { &[] };
            let most = choosers.iter().map(SamplePlan::dispatches).max().unwrap_or(0);
            // Kernel by kernel, so that the rows' choices run side by side.
            for kernel in 0..most {
                choosers.iter().for_each(|chooser| chooser.encode_one(kernel, &mut pass));
            }
            dispatches += choosers.iter().map(|chooser| chooser.dispatches() as u64).sum::<u64>();
            device.meter().dispatched(dispatches);
        }
        let (result, bytes) = if chooses {
            (&made[&Place::Chosen], rows as u64 * TOKEN_STRIDE)
        } else {
            (&made[&Place::Logits], (rows * logits_stride(graph.vocab)) as u64 * 4)
        };
        let states = states_bytes(graph, rows);
        let readback = &mut readbacks[*next];
        readback.copy(device, &mut encoder, result, bytes)?;
        if states > 0 {
            readback.copy_more(&mut encoder, &made[&Place::State], bytes, states);
        }
        readback.copy_more(&mut encoder, &made[&Place::BlockTable], bytes + states, 4);
        let submission = device.submit(encoder)?;
        readback.submitted(bytes + states + 4, &submission);
        together.flights.push_back(Flight { readback: *next, ..flight });
        *next = (*next + 1) % FLIGHTS_MAX;
        Ok(())
    }

    /// Waits for the oldest step of rows in flight. `None` if there is none.
    pub(in crate::gpu) fn take_rows(&mut self) -> Result<Option<Report>> {
        let vocab = self.graph.vocab;
        let Self { device, together, .. } = self;
        let Some(together) = together.as_mut() else { return Ok(None) };
        let Some(flight) = together.flights.pop_front() else { return Ok(None) };
        let nothing = || BackendError::Lost("the result of rows".into());
        let bytes = together.readbacks[flight.readback].take(device)?.ok_or_else(nothing)?;
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        together.clamped = words.last().copied().map_or(0, u64::from);
        let states = states_bytes(&self.graph, flight.rows) as usize / 4;
        let (result, state) = words[..words.len() - 1].split_at(words.len() - 1 - states);
        let mut report = chosen_experts(&self.graph, state, flight.rows)?;
        if report.halted.is_some() {
            // The step behind it chose nothing.
            while let Some(behind) = together.flights.pop_front() {
                together.readbacks[behind.readback].take(device)?;
            }
            device.write(together.buffers.of(Place::State), 0, &[0; 4]);
            together.halted = Some(flight);
            return Ok(Some(report));
        }
        if flight.chooses {
            let tokens = result.chunks_exact(TOKEN_STRIDE as usize / 4);
            report.tokens = tokens.map(|row| row[0]).collect();
            return Ok(Some(report));
        }
        let mut logits = Vec::with_capacity(flight.rows * vocab);
        for row in result.chunks_exact(logits_stride(vocab)) {
            logits.extend_from_slice(bytemuck::cast_slice(&row[..vocab]));
        }
        together.logits = Some(logits);
        Ok(Some(report))
    }

    /// How many steps of rows may be queued now.
    pub(in crate::gpu) fn rows_room(&self) -> usize {
        FLIGHTS_MAX - self.together.as_ref().map_or(0, |together| together.flights.len())
    }

    /// The logits of the last step of rows, if it was the last step.
    pub(in crate::gpu) fn row_logits(&mut self) -> Option<Vec<f32>> {
        self.together.as_mut().and_then(|together| together.logits.take())
    }

    /// Abandons the rows in flight.
    pub(in crate::gpu) fn drop_rows(&mut self) {
        let Some(together) = &mut self.together else { return };
        let mut gone = together.halted.take().is_some();
        while let Some(flight) = together.flights.pop_front() {
            // Neither the result nor an error matters any more.
            let _ = together.readbacks[flight.readback].take(&self.device);
            gone = true;
        }
        if gone {
            self.device.write(together.buffers.of(Place::State), 0, &[0; 4]);
        }
    }
}

/// Bytes of the state that are read back: which experts the rows chose.
fn states_bytes(graph: &Graph, rows: usize) -> u64 {
    if graph.moe.is_empty() { 0 } else { (rows * Layout::of(graph).state_words) as u64 * 4 }
}

/// Where a step halted, and which experts its rows chose up to there, each once.
fn chosen_experts(graph: &Graph, state: &[u32], rows: usize) -> Result<Report> {
    let mut report = Report::default();
    let Some(first) = state.first() else { return Ok(report) };
    report.halted = first.checked_sub(1).map(|layer| MoeId(layer as u16));
    let layout = Layout::of(graph);
    let reached = report.halted.map_or(graph.moe.len(), |moe| usize::from(moe.0) + 1);
    for (layer, moe) in graph.moe.iter().enumerate() {
        let mut ids = Vec::new();
        if layer < reached {
            let of =
                |row: usize| &state[row * layout.state_words + layout.ids_at[layer]..][..moe.top_k];
            ids = (0..rows).flat_map(of).copied().collect();
            ids.sort_unstable();
            ids.dedup();
        }
        if let Some(id) = ids.last().filter(|id| **id as usize >= moe.experts.len()) {
            return Err(BackendError::Lost(format!("it chose expert {id}")));
        }
        report.experts.push(ids);
        report.brought.push(Vec::new());
    }
    Ok(report)
}
