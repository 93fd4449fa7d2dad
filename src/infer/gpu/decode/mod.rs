//! One token as one submission: fused kernels over packed weights where a rewrite matches, and the
//! ops' own kernels elsewhere. The router's choice is looked up in a table on the device, so that a
//! full hit does not involve the host.
//!
//! `token` lowers the graph with `rewrites`, `live` finds what a halted layer needs, `layout` and
//! `buffers` hold what the dispatches share. A token whose expert has no slot fetches it from host
//! memory, if it is there, into an offered slot; the host learns of it from the report. Otherwise
//! the token halts at that layer: the host fills the slot and restarts the layer from what was set
//! aside. Tokens queued behind a halted one see the halt in the state, change no persistent state,
//! and are queued again. If tokens halt often, only as many layers are queued as will probably run.
//!
//! Only one token takes offered slots: the first that misses anything. Its report says what it
//! took, and the next offer does not contain those slots.

mod buffers;
mod flight;
mod layout;
mod live;
pub(super) mod params;
mod profile;
mod rewrites;
mod together;
mod token;

use std::collections::VecDeque;

use wgpu::BufferUsages;

use flight::{Begin, Flight, Recorded};

pub(super) use buffers::{DecodeBuffers, elements};
pub(super) use layout::Layout;
pub(super) use rewrites::{together, workgroups_of};
pub(super) use together::{RowBuffers, Together, logits_stride};
pub(super) use token::{Aside, Fuse, Points, TokenSteps};

use super::device::GpuDevice;
use super::executor::GpuBackend;
use super::experts::Experts;
use super::params::Step as StepParams;
use super::readback::Readback;
use super::sample::{Links, SamplePlan};
use crate::backend::{BackendError, Fed, LogitRows, Report, Result, Slot, Want as Wanted};
use crate::graph::{Graph, MoeId, Op};
use crate::sampler::Sampler;

/// The result that a token's step should produce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Nothing,
    Logits,
    /// The next token, chosen on the device.
    Choice,
}

impl From<Wanted> for Want {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Logits(LogitRows::None) => Self::Nothing,
            Wanted::Logits(LogitRows::Last | LogitRows::All) => Self::Logits,
            Wanted::Choice => Self::Choice,
        }
    }
}

/// The most tokens in flight at once.
const FLIGHTS_MAX: usize = 4;

/// The state of the decode path, for a graph that it can run.
pub(super) struct Decode {
    pub buffers: DecodeBuffers,
    /// One for each token in flight.
    reports: Vec<Readback>,
    /// Tokens in flight, oldest first.
    flights: VecDeque<Flight>,
    next: usize,
    /// The token that waits for an expert.
    halted: Option<Flight>,
    /// The number of MoE layers that tokens have recently passed before they halt, on average.
    reach: f32,
    /// The next token's commands, recorded while this one runs.
    recorded: Option<Recorded>,
    /// The choice of the next token, once it has been asked for.
    sample: Option<SamplePlan>,
    chosen: wgpu::Buffer,
    /// The table of cache blocks. A report ends with its first word.
    blocks: wgpu::Buffer,
}

/// How fast `reach` follows observations.
const REACH_GAIN: f32 = 0.25;

impl Decode {
    /// `None` for a graph without logits, whose steps are not tokens.
    pub fn new(device: &GpuDevice, graph: &Graph, blocks: &wgpu::Buffer) -> Result<Option<Self>> {
        if !graph.ops.iter().any(|op| matches!(op, Op::Logits { .. })) {
            return Ok(None);
        }
        let buffers = DecodeBuffers::new(device, graph)?;
        let bytes = buffers.state().size() + 4;
        let reports = (0..FLIGHTS_MAX).map(|_| Readback::new(device, "a token's report", bytes));
        let reports = reports.collect::<Result<_>>()?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let chosen = device.buffer("the chosen token", 4, usage)?;
        let flights = VecDeque::new();
        let reach = graph.moe.len() as f32;
        Ok(Some(Self {
            buffers,
            reports,
            flights,
            next: 0,
            halted: None,
            reach,
            recorded: None,
            sample: None,
            chosen,
            blocks: blocks.clone(),
        }))
    }

    /// Whether a token is in flight.
    pub fn in_flight(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Records that a token passed this many MoE layers.
    fn passed(&mut self, layers: usize) {
        self.reach += (layers as f32 - self.reach) * REACH_GAIN;
    }

    /// The MoE layer, of `layers`, after whose routing a submission should stop. Past the last one
    /// if most of the rest will probably run.
    fn stop(&self, first: usize, layers: usize) -> usize {
        let ahead = (self.reach.round() as usize).max(1);
        if first + 2 * ahead >= layers { layers } else { first + ahead }
    }
}

/// The step methods of `Backend`, for single tokens of a fused graph.
impl GpuBackend {
    pub(super) fn tokens_room(&self) -> usize {
        let Some(decode) = &self.decode else { return 0 };
        // No token may be queued behind one that stops early.
        let whole = decode.flights.iter().all(|flight| flight.layers.1 == self.graph.moe.len());
        if whole { FLIGHTS_MAX - decode.flights.len() } else { 0 }
    }

    pub(super) fn choose_on_device(&mut self, sampler: &Sampler) -> Result<bool> {
        let Self { device, decode, buffers, graph, .. } = self;
        let Some(decode) = decode else { return Ok(false) };
        if let Some(plan) = decode.sample.take_if(|plan| plan.is_for(sampler)) {
            plan.restore(device, sampler)?;
            decode.sample = Some(plan);
            return Ok(true);
        }
        let links = Links {
            logits: &buffers.logits,
            state: decode.buffers.state(),
            tokens: &buffers.tokens,
            chosen: &decode.chosen,
            row: 0,
        };
        decode.recorded = None;
        decode.sample = match SamplePlan::new(device, graph.vocab, links, sampler) {
            Ok(plan) => Some(plan),
            // The host chooses.
            Err(BackendError::Unsupported(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(decode.sample.is_some())
    }

    pub(super) fn submit_token(
        &mut self,
        fed: Fed<'_>,
        position: usize,
        want: Wanted,
    ) -> Result<()> {
        self.check_decode(fed, position)?;
        let position = u32::try_from(position).unwrap_or(u32::MAX);
        let step = StepParams { tokens: 1, position, logit_start: 0, logit_rows: 1 };
        if let Fed::Tokens(token) = fed {
            self.device.write(&self.buffers.tokens, 0, bytemuck::cast_slice(token));
        }
        self.fly(step, want.into(), Begin::Token, 0)
    }

    pub(super) fn offer_slots(&mut self, free: &[Slot]) {
        if let Some(decode) = &mut self.decode {
            decode.buffers.table.offer(free);
        }
    }

    pub(super) fn resume_token(&mut self, moe: MoeId) -> Result<()> {
        let halted = self.decode.as_mut().and_then(|decode| decode.halted.take());
        let Some(flight) = halted else {
            return Err(BackendError::Unsupported("resuming a step that was not halted".into()));
        };
        let layer = usize::from(moe.0);
        self.fly(flight.step, flight.want, Begin::Again(layer), layer)
    }

    pub(super) fn take_report(&mut self) -> Result<Report> {
        self.record_ahead()?;
        let nothing = || BackendError::Unsupported("a report when no token is in flight".into());
        let decode = self.decode.as_mut().ok_or_else(nothing)?;
        let flight = decode.flights.pop_front().ok_or_else(nothing)?;
        let bytes = decode.reports[flight.report].take(&self.device)?.ok_or_else(nothing)?;
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        self.clamped = words.last().copied().map_or(0, u64::from);
        let (first, end) = flight.layers;
        let halted = match words[0] {
            0 => None,
            layer => Some(MoeId((layer - 1) as u16)),
        };
        if let Some(moe) = halted {
            decode.passed(usize::from(moe.0).saturating_sub(first));
        } else {
            decode.passed(2 * (end - first));
            if end < self.graph.moe.len() {
                self.fly(flight.step, flight.want, Begin::On(end), flight.since)?;
                return self.take_report();
            }
        }
        let experts = self.graph.moe.iter().zip(&decode.buffers.layout.ids_at).map(|(moe, at)| {
            let ids = words[*at..*at + moe.top_k].to_vec();
            match ids.iter().find(|id| **id as usize >= moe.experts.len()) {
                Some(id) => Err(BackendError::Lost(format!("it chose expert {id}"))),
                None => Ok(ids),
            }
        });
        let experts: Vec<Vec<u32>> = experts.collect::<Result<_>>()?;
        let reached = halted.map_or(self.graph.moe.len(), |moe| usize::from(moe.0));
        let brought = brought(decode, &self.experts, &words, &flight, &experts, reached)?;
        for (moe, slots) in (0..).map(MoeId).zip(&brought) {
            let bytes = self.experts.slot_bytes(moe).unwrap_or(0) as usize;
            self.device.meter().uploaded(bytes * slots.len());
        }
        if halted.is_some() {
            // The tokens behind it did nothing, and their reports say the same. But each wrote its
            // own step description.
            let followed = !decode.flights.is_empty();
            while let Some(behind) = decode.flights.pop_front() {
                decode.reports[behind.report].take(&self.device)?;
            }
            if followed {
                self.device.write(&self.buffers.step, 0, bytemuck::bytes_of(&flight.step));
            }
            decode.halted = Some(flight);
        }
        Ok(Report { halted, token: words[1], experts, brought, ..Report::default() })
    }

    /// Abandons the token that halted, and those in flight.
    pub(super) fn drop_tokens(&mut self) {
        let Some(decode) = &mut self.decode else { return };
        let mut gone = decode.halted.take().is_some();
        while let Some(flight) = decode.flights.pop_front() {
            // Neither the report nor an error matters any more.
            let _ = decode.reports[flight.report].take(&self.device);
            gone = true;
        }
        if gone {
            self.device.write(decode.buffers.state(), 0, &[0; 4]);
        }
    }
}

/// For each MoE layer, the experts that a token brought into offered slots. Those slots are no
/// longer offered.
///
/// `words` is the state that the token left. `experts` are its choices, which are valid before the
/// layer `reached`.
fn brought(
    decode: &mut Decode,
    slots: &Experts,
    words: &[u32],
    flight: &Flight,
    experts: &[Vec<u32>],
    reached: usize,
) -> Result<Vec<Vec<(u32, Slot)>>> {
    let DecodeBuffers { table, layout: Layout { taker_at, .. }, .. } = &mut decode.buffers;
    let mut brought = vec![Vec::new(); experts.len()];
    if words[*taker_at] != flight.step.position + 1 {
        return Ok(brought);
    }
    let mut taken = vec![0; experts.len()];
    for (layer, chosen) in experts.iter().enumerate().take(reached).skip(flight.since) {
        let moe = MoeId(layer as u16);
        let class = slots.class_of(moe).unwrap_or(0);
        for expert in chosen.iter().filter(|expert| !table.places(moe, **expert)) {
            let at = &mut taken[usize::from(class)];
            let index = table.offered(class).get(*at).ok_or_else(|| {
                BackendError::Lost(format!("it fetched expert {expert} without a slot"))
            })?;
            brought[layer].push((*expert, Slot { class, index: *index }));
            *at += 1;
        }
    }
    if words[*taker_at + 1..][..taken.len()].iter().zip(&taken).any(|(a, b)| *a as usize != *b) {
        return Err(BackendError::Lost("it fetched experts that it did not choose".into()));
    }
    table.offer(&[]);
    Ok(brought)
}

impl GpuBackend {
    fn check_decode(&self, fed: Fed<'_>, position: usize) -> Result<()> {
        let refuse = |what| Err(BackendError::Unsupported(what));
        if self.tokens_room() == 0 {
            return refuse(format!("more than {FLIGHTS_MAX} tokens in flight"));
        }
        if position >= self.capacity.context {
            return refuse(format!(
                "position {position} in a context of {}",
                self.capacity.context
            ));
        }
        match fed {
            Fed::Tokens(&[token, ..]) if token as usize >= self.graph.vocab => {
                refuse(format!("token {token} of a vocabulary of {}", self.graph.vocab))
            }
            _ => Ok(()),
        }
    }
}
