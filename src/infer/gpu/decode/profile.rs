//! How long each kernel of one token takes, measured with timestamps between dispatches.

use wgpu::BufferUsages;

use crate::backend::{BackendError, Result};
use crate::gpu::executor::GpuBackend;
use crate::gpu::params::Step as StepParams;
use crate::gpu::readback::Readback;

/// WebGPU's limit for a query set.
const QUERIES_MAX: usize = 4096;

impl GpuBackend {
    /// Runs `token` at `position` up to its logits, with every expert in its slot. Returns the
    /// kernels in order, with the seconds that each took.
    pub(in crate::gpu) fn profile_token(
        &mut self,
        token: u32,
        position: usize,
    ) -> Result<Vec<(&'static str, f64)>> {
        self.make_plan()?;
        let Self { device, plan, decode, buffers, .. } = self;
        let missing = |what: &str| BackendError::Unsupported(format!("timing kernels: {what}"));
        let (Some(plan), Some(decode)) = (plan.as_ref(), decode.as_mut()) else {
            return Err(missing("the graph is not fused"));
        };
        let Some(sequence) = &plan.decode else { return Err(missing("the graph is not fused")) };
        if !device.wgpu().features().contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES) {
            return Err(missing("the adapter has no timestamps inside passes"));
        }
        let count = sequence.steps.len() + 1;
        if count > QUERIES_MAX {
            return Err(missing("more dispatches than timestamps"));
        }
        let position = u32::try_from(position).unwrap_or(u32::MAX);
        let step = StepParams { tokens: 1, position, logit_start: 0, logit_rows: 1 };
        device.write(&buffers.step, 0, bytemuck::bytes_of(&step));
        device.write(&buffers.tokens, 0, bytemuck::bytes_of(&token));
        decode.buffers.table.flush(device);
        let bytes = count as u64 * 8;
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let resolved = device.buffer("kernel times", bytes, usage)?;
        let mut readback = Readback::new(device, "kernel times", bytes)?;
        let label = Some("profile");
        let queries = device.scoped("timestamps", 0, |wgpu| {
            let ty = wgpu::QueryType::Timestamp;
            wgpu.create_query_set(&wgpu::QuerySetDescriptor { label, ty, count: count as u32 })
        })?;
        let mut encoder =
            device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.write_timestamp(&queries, 0);
            for (dispatch, i) in sequence.steps.iter().zip(1..) {
                plan.encode(device, &mut pass, dispatch, &step)?;
                pass.write_timestamp(&queries, i);
            }
        }
        encoder.resolve_query_set(&queries, 0..count as u32, &resolved, 0);
        readback.copy(device, &mut encoder, &resolved, bytes)?;
        let submission = device.submit(encoder)?;
        readback.submitted(bytes, &submission);
        let bytes = readback.take(device)?.unwrap_or_default();
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let seconds = f64::from(device.tick_nanoseconds()) * 1e-9;
        let names = sequence.steps.iter().map(|dispatch| dispatch.pipeline.kernel.name);
        let spans = ticks.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * seconds);
        Ok(names.zip(spans).collect())
    }
}
