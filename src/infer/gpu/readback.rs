//! A mappable buffer to which device results are copied. The copy is recorded in the submission
//! that computes them, mapping starts right after it, and the caller waits only when it takes the
//! bytes.

use std::sync::mpsc;

use wgpu::BufferUsages;

use super::device::{ANSWER_WAIT_MAX, GpuDevice};
use crate::backend::{BackendError, Result};

/// Such a buffer, with at most one copy in flight.
pub(super) struct Readback {
    what: &'static str,
    buffer: wgpu::Buffer,
    pending: Option<Pending>,
}

struct Pending {
    bytes: u64,
    submission: wgpu::SubmissionIndex,
    mapped: mpsc::Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
}

impl Readback {
    pub fn new(device: &GpuDevice, what: &'static str, bytes: u64) -> Result<Self> {
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        Ok(Self { what, buffer: device.buffer(what, bytes, usage)?, pending: None })
    }

    /// Records the copy of the first `bytes` of `from`. The result of an earlier copy that nobody
    /// took is dropped.
    pub fn copy(
        &mut self,
        device: &GpuDevice,
        encoder: &mut wgpu::CommandEncoder,
        from: &wgpu::Buffer,
        bytes: u64,
    ) -> Result<()> {
        if self.pending.is_some() {
            self.take(device)?;
        }
        encoder.copy_buffer_to_buffer(from, 0, &self.buffer, 0, Some(bytes));
        Ok(())
    }

    /// As `copy`, followed by the first word of `tail`.
    pub fn copy_with(
        &mut self,
        device: &GpuDevice,
        encoder: &mut wgpu::CommandEncoder,
        from: &wgpu::Buffer,
        bytes: u64,
        tail: &wgpu::Buffer,
    ) -> Result<()> {
        self.copy(device, encoder, from, bytes)?;
        encoder.copy_buffer_to_buffer(tail, 0, &self.buffer, bytes, Some(4));
        Ok(())
    }

    /// Records the copy of the first `bytes` of another buffer, to byte `at` of what is read. Call after
    /// `copy`.
    pub fn copy_more(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        from: &wgpu::Buffer,
        at: u64,
        bytes: u64,
    ) {
        encoder.copy_buffer_to_buffer(from, 0, &self.buffer, at, Some(bytes));
    }

    /// Records the copy of a part of another buffer, to byte `at` of what is read. Nothing else may be in
    /// flight.
    pub fn copy_part(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        from: &wgpu::Buffer,
        first: u64,
        at: u64,
        bytes: u64,
    ) {
        encoder.copy_buffer_to_buffer(from, first, &self.buffer, at, Some(bytes));
    }

    /// Call once the recorded copy has been submitted.
    pub fn submitted(&mut self, bytes: u64, submission: &wgpu::SubmissionIndex) {
        let (sender, mapped) = mpsc::channel();
        self.buffer.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            // The receiver is gone only if the backend is.
            let _ = sender.send(result);
        });
        self.pending = Some(Pending { bytes, submission: submission.clone(), mapped });
    }

    /// Waits for the copy and returns its bytes. `None` if no copy is in flight.
    pub fn take(&mut self, device: &GpuDevice) -> Result<Option<Vec<u8>>> {
        let Some(pending) = self.pending.take() else { return Ok(None) };
        device.meter().read_back();
        let answer = device.watch(|| pending.mapped.try_recv().ok());
        match answer {
            Some(_) => device.check()?,
            None => device.wait(Some(pending.submission))?,
        }
        let lost = |why: String| BackendError::Lost(format!("reading {}: {why}", self.what));
        // Whoever polls a shared device runs the callbacks. That may be another thread right now.
        match answer.map_or_else(|| pending.mapped.recv_timeout(ANSWER_WAIT_MAX), Ok) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(lost(e.to_string())),
            Err(e) => return Err(lost(e.to_string())),
        }
        let view = self.buffer.get_mapped_range(0..pending.bytes).map_err(|e| lost(e.to_string()));
        let bytes = view.map(|view| view.to_vec());
        self.buffer.unmap();
        bytes.map(Some)
    }
}
