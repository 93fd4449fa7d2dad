//! Runs a single kernel: fills its bindings from words, dispatches it once, and reads its bindings
//! back as words.
//!
//! A change deliberately breaks the kernel, to see whether a comparison notices.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::gpu::GpuDevice;
use crate::gpu::kernels::Kernel;
use crate::gpu::lower::checked;
use crate::gpu::params::{ARENA_SLOT, Params, Steps};
use crate::gpu::pipelines::Pipeline;
use crate::gpu::readback::Readback;

/// A text in a kernel, and its replacement.
pub(super) type Change = (&'static str, &'static str);

/// Runs single kernels on a device.
pub(super) struct Alone<'a> {
    device: &'a GpuDevice,
    changes: Vec<Change>,
    changed: RefCell<HashMap<String, Arc<Pipeline>>>,
}

impl<'a> Alone<'a> {
    pub fn new(device: &'a GpuDevice) -> Self {
        Self { device, changes: Vec::new(), changed: RefCell::default() }
    }

    /// Runs kernels in which the text is replaced everywhere.
    pub fn with(device: &'a GpuDevice, change: Change) -> Self {
        Self::with_all(device, &[change])
    }

    /// Runs kernels in which each text is replaced everywhere, one after the other.
    pub fn with_all(device: &'a GpuDevice, changes: &[Change]) -> Self {
        Self { changes: changes.to_vec(), ..Self::new(device) }
    }

    pub fn device(&self) -> &GpuDevice {
        self.device
    }

    /// The variants of team sums that this device supports.
    pub fn teams(&self) -> &'static [&'static str] {
        if self.device.team() == "group" { &["group"] } else { &["group", "subgroup"] }
    }

    fn pipeline(&self, name: &str) -> Arc<Pipeline> {
        if self.changes.is_empty() {
            return self.device.pipelines().get(self.device, name).unwrap();
        }
        let make = || {
            let kernel = Kernel::find(name).unwrap_or_else(|| panic!("there is no kernel {name}"));
            let mut source = kernel.source.to_owned();
            for (from, to) in &self.changes {
                assert!(source.contains(from), "{name} does not contain {from:?}");
                source = source.replace(from, to);
            }
            let kernel = Box::leak(Box::new(Kernel { source: source.leak(), ..*kernel }));
            let make = |wgpu: &wgpu::Device| self.device.pipelines().make(wgpu, kernel);
            Arc::new(self.device.scoped(name, 0, make).unwrap())
        };
        Arc::clone(self.changed.borrow_mut().entry(name.to_owned()).or_insert_with(make))
    }

    /// Runs a kernel over `buffers` for the token at `position`, and returns the buffers
    /// afterwards.
    pub fn run(
        &self,
        name: &str,
        position: usize,
        params: &impl Params,
        buffers: &[Vec<u32>],
        grid: (u32, u32),
    ) -> Vec<Vec<u32>> {
        let position = position as u32;
        let steps = Steps { tokens: 1, position, logit_rows: 1, ..Steps::default() };
        self.run_steps(name, &steps, params, buffers, grid)
    }

    /// As `run`, for any step.
    pub fn run_steps(
        &self,
        name: &str,
        steps: &Steps,
        params: &impl Params,
        buffers: &[Vec<u32>],
        (x, y): (u32, u32),
    ) -> Vec<Vec<u32>> {
        let device = self.device;
        let pipeline = self.pipeline(name);
        checked(name, params);
        let params: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(params));
        let make = |what, words: &[u32], usage| {
            let buffer = device.buffer(what, words.len() as u64 * 4, usage).unwrap();
            device.write(&buffer, 0, bytemuck::cast_slice(words));
            buffer
        };
        let uniform = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        // One buffer holds the step and, one slot further, the parameters.
        let slot = ARENA_SLOT as usize / 4;
        let mut words = vec![0; 2 * slot];
        let step: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(steps));
        words[..step.len()].copy_from_slice(step);
        words[slot..slot + params.len()].copy_from_slice(params);
        let arena = make("parameters", &words, uniform);
        let common = device.common(&arena).unwrap();
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        let bound: Vec<_> = buffers.iter().map(|words| make("words", words, usage)).collect();
        let storage = pipeline.bind(device, &bound.iter().collect::<Vec<_>>()).unwrap();
        let mut encoder = device.wgpu().create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &common, &[ARENA_SLOT as u32]);
            pass.set_bind_group(1, &storage, &[]);
            pass.dispatch_workgroups(x, y, 1);
        }
        device.submit(encoder).unwrap();
        let read = |(buffer, given): (&wgpu::Buffer, &Vec<u32>)| {
            let mut readback = Readback::new(device, "words", buffer.size()).unwrap();
            let mut encoder = device.wgpu().create_command_encoder(&Default::default());
            readback.copy(device, &mut encoder, buffer, buffer.size()).unwrap();
            let submission = device.submit(encoder).unwrap();
            readback.submitted(buffer.size(), &submission);
            let mut words = bytemuck::pod_collect_to_vec(&readback.take(device).unwrap().unwrap());
            words.truncate(given.len());
            words
        };
        bound.iter().zip(buffers).map(read).collect()
    }
}
