//! One token's submission: its inputs, its dispatches, its report.
//!
//! If tokens may miss experts, only one is in flight, because the slots offered to the next one
//! depend on its report. The next one's dispatches do not depend on it, so they are recorded while
//! it runs.

use super::super::buffers::Buffers;
use super::super::device::GpuDevice;
use super::super::dispatch::Dispatch;
use super::super::executor::GpuBackend;
use super::super::params::Step as StepParams;
use super::super::plan::Plan;
use super::super::timing::PassClock;
use super::{Aside, Decode, FLIGHTS_MAX, TokenSteps, Want};
use crate::backend::{BackendError, Result};

/// A token in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    /// The index of the report that it writes.
    pub report: usize,
    pub step: StepParams,
    pub want: Want,
    /// The MoE layers that it runs: from the first number up to the routing of the second. The
    /// second is past the last layer unless the token will be continued from there.
    pub layers: (usize, usize),
    /// The first MoE layer about which the host knows nothing yet.
    pub since: usize,
}

/// Where a submission begins.
#[derive(Debug, Clone, Copy)]
pub(super) enum Begin {
    Token,
    /// After the routing of a MoE layer, where the previous submission stopped.
    On(usize),
    /// At the MoE layer that halted it.
    Again(usize),
}

/// A whole token's commands.
pub(super) struct Recorded {
    commands: wgpu::CommandBuffer,
    position: u32,
    want: Want,
    report: usize,
    dispatches: u64,
}

impl Recorded {
    fn is(&self, position: u32, want: Want) -> bool {
        (self.position, self.want) == (position, want)
    }
}

impl GpuBackend {
    // Long: one submission, in the order in which the device sees it.
    /// Submits one token's dispatches: all of them, or those from a MoE layer on, up to the layer
    /// at which it will probably halt. `since` is the first layer for which the report must say
    /// which experts were brought in.
    pub(super) fn fly(
        &mut self,
        step: StepParams,
        want: Want,
        begin: Begin,
        since: usize,
    ) -> Result<()> {
        self.make_plan()?;
        let layers = self.graph.moe.len();
        let Self { device, plan, decode, buffers, spill, .. } = self;
        let (fused, decode) = fused(device, plan.as_ref(), decode.as_mut())?;
        let sequence = fused.sequence;
        // A continued token finds its inputs in place.
        if let Begin::Token = begin {
            device.write(&buffers.step, 0, bytemuck::bytes_of(&step));
        }
        decode.buffers.table.flush(device);
        let label = Some("token");
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        if let Some(spill) = spill {
            spill.encode(&mut encoder);
        }
        let (first_layer, first) = match begin {
            Begin::Token => (0, 0),
            Begin::On(layer) => (layer, sequence.layers[layer].routed),
            Begin::Again(layer) => (layer, sequence.layers[layer].resume),
        };
        let last_layer = decode.stop(first_layer, layers);
        let whole = last_layer == layers;
        if let Begin::Again(layer) = begin {
            for Aside { of, at, bytes } in &sequence.layers[layer].aside {
                let (at, bytes) = (*at as u64, Some(*bytes as u64));
                encoder.copy_buffer_to_buffer(decode.buffers.aside(), at, of, 0, bytes);
            }
            encoder.clear_buffer(decode.buffers.state(), 0, Some(4));
        }
        // No token in flight could have taken any of the offered slots.
        let offered = spill.is_some() && decode.flights.is_empty();
        if offered && !matches!(begin, Begin::On(_)) {
            let at = decode.buffers.layout.taker_at as u64 * 4;
            encoder.clear_buffer(decode.buffers.state(), at, None);
        }
        let is_it = |recorded: &Recorded| {
            whole && matches!(begin, Begin::Token) && recorded.is(step.position, want)
        };
        let logits = whole && want == Want::Logits;
        let logit_bytes = self.graph.vocab as u64 * 4;
        let (submission, report) = match decode.recorded.take().filter(is_it) {
            Some(recorded) => {
                let clock = device.meter().pass();
                let end = clock.as_ref().map(|clock| {
                    clock.begin(&mut encoder);
                    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
                    clock.end(&mut encoder);
                    encoder.finish()
                });
                device.meter().dispatched(recorded.dispatches);
                let more = std::iter::once(recorded.commands).chain(end);
                (device.submit_all(encoder, more)?, recorded.report)
            }
            None => {
                let end = match want {
                    _ if !whole => sequence.layers[last_layer].routed,
                    Want::Nothing => sequence.tail,
                    Want::Logits | Want::Choice => sequence.steps.len(),
                };
                let chosen = whole && want == Want::Choice;
                let clock = device.meter().pass();
                let (report, dispatches) =
                    decode.record(&fused, first..end, chosen, &step, &mut encoder, clock)?;
                device.meter().dispatched(dispatches);
                if logits {
                    let Buffers { logits: from, blocks, logits_readback, .. } = buffers;
                    logits_readback.copy_with(device, &mut encoder, from, logit_bytes, blocks)?;
                }
                (device.submit(encoder)?, report)
            }
        };
        decode.next = (report + 1) % FLIGHTS_MAX;
        decode.reports[report].submitted(decode.buffers.state().size() + 4, &submission);
        if logits {
            buffers.logits_readback.submitted(logit_bytes + 4, &submission);
        }
        let layers = (first_layer, last_layer);
        decode.flights.push_back(Flight { report, step, want, layers, since });
        Ok(())
    }

    /// Records the token after the only one in flight, if it will probably be needed unchanged.
    pub(super) fn record_ahead(&mut self) -> Result<()> {
        let layers = self.graph.moe.len();
        let Self { device, plan, decode, spill, capacity, .. } = self;
        let Ok((fused, decode)) = fused(device, plan.as_ref(), decode.as_mut()) else {
            return Ok(());
        };
        let flight = match decode.flights.front() {
            Some(flight) if decode.flights.len() == 1 => *flight,
            _ => return Ok(()),
        };
        let step = StepParams { position: flight.step.position + 1, ..flight.step };
        let fits = (step.position as usize) < capacity.context && flight.layers.1 == layers;
        let known = |recorded: &Recorded| recorded.is(step.position, flight.want);
        let known = decode.recorded.as_ref().is_some_and(known);
        // Logits are read back through a single buffer, which is still in use.
        if spill.is_none() || known || !fits || flight.want == Want::Logits {
            return Ok(());
        }
        if !device.meter().records_ahead(device) {
            return Ok(());
        }
        let chosen = flight.want == Want::Choice;
        let end = if chosen { fused.sequence.steps.len() } else { fused.sequence.tail };
        let label = Some("the next token");
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        let (report, dispatches) =
            decode.record(&fused, 0..end, chosen, &step, &mut encoder, None)?;
        let commands = device.scoped("recording a token", 0, |_| encoder.finish())?;
        let (position, want) = (step.position, flight.want);
        decode.recorded = Some(Recorded { commands, position, want, report, dispatches });
        Ok(())
    }
}

impl Decode {
    /// Call when the plan from which it was recorded is gone.
    pub(in crate::gpu) fn forget_recorded(&mut self) {
        self.recorded = None;
    }

    /// Records these dispatches, then the choice of a token if one is to be `chosen`, then their
    /// report. Returns the report's index and the number of dispatches.
    fn record(
        &mut self,
        Made { device, plan, sequence }: &Made<'_>,
        steps: std::ops::Range<usize>,
        chosen: bool,
        step: &StepParams,
        encoder: &mut wgpu::CommandEncoder,
        clock: Option<PassClock>,
    ) -> Result<(usize, u64)> {
        let mut dispatches = 0;
        let label = Some("token");
        {
            let timestamp_writes = clock.as_ref().map(PassClock::writes);
            let mut pass = encoder
                .begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes });
            for dispatch in &sequence.steps[steps] {
                dispatches += plan.encode(device, &mut pass, dispatch, step)?;
            }
            if chosen {
                let Some(sample) = &self.sample else {
                    return Err(BackendError::Unsupported("a choice without a sampler".into()));
                };
                sample.encode(&mut pass);
                dispatches += sample.dispatches() as u64;
            }
        }
        let state = self.buffers.state();
        if chosen {
            encoder.copy_buffer_to_buffer(&self.chosen, 0, state, 4, Some(4));
        }
        let tail = &self.blocks;
        self.reports[self.next].copy_with(device, encoder, state, state.size(), tail)?;
        Ok((self.next, dispatches))
    }
}

/// What is needed to run a fused graph's tokens.
struct Made<'a> {
    device: &'a GpuDevice,
    plan: &'a Plan,
    sequence: &'a TokenSteps<Dispatch, wgpu::Buffer>,
}

fn fused<'a>(
    device: &'a GpuDevice,
    plan: Option<&'a Plan>,
    decode: Option<&'a mut Decode>,
) -> Result<(Made<'a>, &'a mut Decode)> {
    let sequence = plan.and_then(|plan| Some((plan, plan.decode.as_ref()?)));
    match (sequence, decode) {
        (Some((plan, sequence)), Some(decode)) => Ok((Made { device, plan, sequence }, decode)),
        _ => Err(BackendError::Unsupported("a graph that is not fused".into())),
    }
}
