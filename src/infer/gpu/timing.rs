//! Counts what a backend does on its device, and measures how long the device takes.
//!
//! Counting is always on and costs an addition. Times come from timestamps that the device writes
//! at the beginning and the end of a compute pass, only on request ([`GpuDevice::timed`]) and if
//! the adapter has them. They are read back when the queries are used up or the counters are asked
//! for, which waits for the device. Bandwidths are measured with copies and the host's clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use wgpu::BufferUsages;

use super::device::{ANSWER_WAIT_MAX, GpuDevice};
use super::params::{self, ARENA_SLOT};
use super::spill;
use super::weights::Uploads;
use crate::backend::{BackendError, Bandwidth, Counters, Result};

/// Timestamps kept on the device before they are read back. WebGPU's limit for a query set.
const QUERIES: u32 = 4096;
/// Bytes of one timestamp.
const STAMP_BYTES: u64 = 8;

/// Bytes of each of the two buffers of a copy, on a GPU (larger than any cache) and on a software
/// adapter.
const COPY_BYTES: (u64, u64) = (512 << 20, 32 << 20);
/// Bytes written in one measurement of uploads.
const UPLOAD_BYTES: (u64, u64) = (256 << 20, 32 << 20);
/// Copies in one submission.
const COPIES: u64 = 8;
/// Measurements. The best one counts, because disturbances only ever slow one down.
const ROUNDS: usize = 5;

/// A backend's counters. Shared by the clones of its device.
pub(super) struct Meter {
    dispatches: AtomicU64,
    submissions: AtomicU64,
    readbacks: AtomicU64,
    uploaded_bytes: AtomicU64,
    clock: Option<Mutex<Clock>>,
}

/// Timestamps of passes.
struct Clock {
    queries: wgpu::QuerySet,
    /// Queries written since they were last read.
    used: u32,
    resolved: wgpu::Buffer,
    mapped: wgpu::Buffer,
    seconds_per_tick: f64,
    seconds: f64,
}

/// Where one pass records its beginning and end.
pub(super) struct PassClock {
    queries: wgpu::QuerySet,
    first: u32,
}

impl PassClock {
    pub fn writes(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(self.first),
            end_of_pass_write_index: Some(self.first + 1),
        }
    }

    /// Records the beginning, before commands that are recorded elsewhere. Must be submitted in any
    /// case.
    pub fn begin(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.write_timestamp(&self.queries, self.first);
    }

    /// Records their end.
    pub fn end(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.write_timestamp(&self.queries, self.first + 1);
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Meter {
    /// If `timed`, it has a clock, provided that the device has timestamps.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue, timed: bool) -> Self {
        let timed = timed && device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        Self {
            dispatches: AtomicU64::new(0),
            submissions: AtomicU64::new(0),
            readbacks: AtomicU64::new(0),
            uploaded_bytes: AtomicU64::new(0),
            clock: timed.then(|| Mutex::new(Clock::new(device, queue))),
        }
    }

    pub fn dispatched(&self, count: u64) {
        add(&self.dispatches, count);
    }

    pub fn submitted(&self) {
        add(&self.submissions, 1);
    }

    pub fn read_back(&self) {
        add(&self.readbacks, 1);
    }

    pub fn uploaded(&self, bytes: usize) {
        add(&self.uploaded_bytes, bytes as u64);
    }

    /// A clock for the next compute pass, or for commands recorded before, which must be submitted.
    /// `None` if passes are not timed.
    pub fn pass(&self) -> Option<PassClock> {
        let mut clock = self.clock.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let first = clock.used;
        if first + 2 > QUERIES {
            return None; // more passes in one submission than there are queries
        }
        clock.used += 2;
        Some(PassClock { queries: clock.queries.clone(), first })
    }

    /// Whether commands can be recorded before it is certain that they will be submitted.
    pub fn records_ahead(&self, device: &GpuDevice) -> bool {
        let features = device.wgpu().features();
        self.clock.is_none() || features.contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS)
    }

    /// Reads the timestamps if no queries would be left for the next pass.
    pub fn make_room(&self, device: &GpuDevice) -> Result<()> {
        let Some(clock) = &self.clock else { return Ok(()) };
        let mut clock = clock.lock().unwrap_or_else(PoisonError::into_inner);
        if clock.used + 2 > QUERIES { clock.read(device) } else { Ok(()) }
    }

    /// Waits for what was submitted, if passes are timed.
    pub fn counters(&self, device: &GpuDevice) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = self.clock.as_ref().and_then(|clock| {
            let mut clock = clock.lock().unwrap_or_else(PoisonError::into_inner);
            // A lost device reports it at the next step.
            clock.read(device).ok().map(|()| clock.seconds)
        });
        Counters {
            dispatches: get(&self.dispatches),
            submissions: get(&self.submissions),
            readbacks: get(&self.readbacks),
            uploaded_bytes: get(&self.uploaded_bytes),
            device_seconds: seconds,
        }
    }
}

impl Clock {
    fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        let label = Some("timestamps");
        let size = u64::from(QUERIES) * STAMP_BYTES;
        let buffer = |usage| {
            let mapped_at_creation = false;
            device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation })
        };
        let ty = wgpu::QueryType::Timestamp;
        let queries =
            device.create_query_set(&wgpu::QuerySetDescriptor { label, ty, count: QUERIES });
        Self {
            queries,
            used: 0,
            resolved: buffer(BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC),
            mapped: buffer(BufferUsages::COPY_DST | BufferUsages::MAP_READ),
            seconds_per_tick: f64::from(queue.get_timestamp_period()) * 1e-9,
            seconds: 0.0,
        }
    }

    /// Adds up the passes since the last call.
    fn read(&mut self, device: &GpuDevice) -> Result<()> {
        if self.used == 0 {
            return Ok(());
        }
        let bytes = u64::from(self.used) * STAMP_BYTES;
        let mut encoder = device.wgpu().create_command_encoder(&Default::default());
        encoder.resolve_query_set(&self.queries, 0..self.used, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.mapped, 0, Some(bytes));
        self.used = 0;
        let submission = device.submit_unmetered(encoder, None)?;
        let (sender, mapped) = std::sync::mpsc::channel();
        self.mapped.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            let _ = sender.send(result.map_err(|e| e.to_string()));
        });
        device.wait(Some(submission))?;
        let lost = |why: String| BackendError::Lost(format!("reading timestamps: {why}"));
        mapped.recv_timeout(ANSWER_WAIT_MAX).map_err(|e| lost(e.to_string()))?.map_err(lost)?;
        let view = self.mapped.get_mapped_range(0..bytes).map_err(|e| lost(e.to_string()))?;
        let stamps: Vec<u64> = bytemuck::pod_collect_to_vec(&view);
        drop(view);
        self.mapped.unmap();
        let ticks = stamps.chunks_exact(2).map(|pass| pass[1].saturating_sub(pass[0]));
        self.seconds += ticks.sum::<u64>() as f64 * self.seconds_per_tick;
        Ok(())
    }
}

/// Bytes a second of copies on the device (reads plus writes) and of uploads to it.
pub(super) fn bandwidth(device: &GpuDevice) -> Result<Bandwidth> {
    let software = device.is_software();
    let pick = |(hardware_bytes, software_bytes)| match software {
        true => software_bytes,
        false => hardware_bytes,
    };
    let copy_bytes_s = copy_bandwidth(device, pick(COPY_BYTES))?;
    let mut upload_bytes_s = upload_bandwidth(device, pick(UPLOAD_BYTES))?;
    if device.spills() {
        upload_bytes_s = upload_bytes_s.max(fetch_bandwidth(device, pick(UPLOAD_BYTES))?);
    }
    Ok(Bandwidth { copy_bytes_s, upload_bytes_s })
}

/// The largest buffer of up to `bytes` for which there is room, and its size.
fn scratch(device: &GpuDevice, what: &str, bytes: u64) -> Result<(wgpu::Buffer, u64)> {
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
    let mut size = bytes.min(device.binding_bytes_max());
    loop {
        match device.buffer(what, size, usage) {
            Ok(buffer) => return Ok((buffer, size)),
            Err(BackendError::OutOfMemory { .. }) if size > 1 << 20 => size /= 2,
            Err(error) => return Err(error),
        }
    }
}

/// Bytes a second at which the device copies from host memory by itself.
fn fetch_bandwidth(device: &GpuDevice, bytes: u64) -> Result<f64> {
    let from = device.buffer("host memory", bytes, spill::USAGE)?;
    let (to, bytes) = scratch(device, "the target of a fetch", bytes)?;
    // Written first, because unwritten pages need not be read at all.
    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(&to, 0, &from, 0, Some(bytes));
    let submission = device.submit(encoder)?;
    device.wait(Some(submission))?;
    let mut best = 0.0_f64;
    for _ in 0..ROUNDS {
        let mut encoder = device.wgpu().create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&from, 0, &to, 0, Some(bytes));
        let started = Instant::now();
        let submission = device.submit(encoder)?;
        device.wait(Some(submission))?;
        best = best.max(bytes as f64 / started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn copy_bandwidth(device: &GpuDevice, bytes: u64) -> Result<f64> {
    let (from, bytes) = scratch(device, "the source of a copy", bytes)?;
    let (to, bytes) = scratch(device, "the target of a copy", bytes)?;
    // Written first, because unwritten pages need not be read at all.
    device.write(&from, 0, &[1; 16]);
    let pipeline = device.pipelines().get(device, "copy")?;
    let arena = device.buffer(
        "copy parameters",
        ARENA_SLOT,
        BufferUsages::UNIFORM | BufferUsages::COPY_DST,
    )?;
    let vec4s = u32::try_from(bytes / 16).unwrap_or(u32::MAX);
    device.write(&arena, 0, bytemuck::bytes_of(&params::Copy { count: vec4s }));
    let common = device.common(&arena)?;
    let groups = [pipeline.bind(device, &[&from, &to])?, pipeline.bind(device, &[&to, &from])?];
    let groups_needed = vec4s.div_ceil(1024);
    let x = groups_needed.min(device.workgroups_max());
    let y = groups_needed.div_ceil(x.max(1));
    let mut best = 0.0_f64;
    for round in 0..=ROUNDS {
        let mut encoder = device.wgpu().create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &common, &[0]);
            for copy in 0..COPIES {
                pass.set_bind_group(1, &groups[(copy % 2) as usize], &[]);
                pass.dispatch_workgroups(x, y, 1);
            }
        }
        let started = Instant::now();
        let submission = device.submit(encoder)?;
        device.wait(Some(submission))?;
        let seconds = started.elapsed().as_secs_f64();
        if round > 0 {
            best = best.max((2 * COPIES * bytes) as f64 / seconds);
        }
    }
    Ok(best)
}

fn upload_bandwidth(device: &GpuDevice, bytes: u64) -> Result<f64> {
    let (to, bytes) = scratch(device, "the target of an upload", bytes)?;
    let piece = vec![0x5a; usize::try_from(bytes.min(16 << 20)).unwrap_or(1 << 20)];
    let mut best = 0.0_f64;
    for round in 0..=ROUNDS {
        let mut uploads = Uploads::default();
        let mut at = 0;
        let started = Instant::now();
        while at + piece.len() as u64 <= bytes {
            uploads.write(device, &to, at, &piece)?;
            at += piece.len() as u64;
        }
        device.flush()?;
        let seconds = started.elapsed().as_secs_f64();
        if round > 0 {
            best = best.max(at as f64 / seconds);
        }
    }
    Ok(best)
}
