//! Compute pipelines, made once for each device and kernel, with explicit layouts.
//!
//! Group 0 has one layout for all kernels (the step; the parameters, by dynamic offset). Group 1's
//! layout depends on which of its storage buffers the kernel writes. Shader modules keep naga's
//! bounds checks: the unchecked form is `unsafe`, which this crate forbids.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use wgpu::{BindGroupLayout, BindGroupLayoutEntry, BindingType, BufferBindingType, ShaderStages};

use super::cooperative::Cooperative;
use super::device::GpuDevice;
use super::kernels::Kernel;
use super::params::{ARENA_SLOT, Steps};
use super::pipeline_file::PipelineFile;
use super::trusted;
use crate::backend::{BackendError, Result};

/// How the kernels sum a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// One invocation per row, without barriers. For software adapters.
    Lane,
    /// A workgroup of 64 per row. For hardware.
    Group,
}

impl Reduction {
    /// The suffix of the kernels' names.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Lane => "lane",
            Self::Group => "group",
        }
    }

    /// Rows that one workgroup sums.
    pub(super) const fn rows_per_workgroup(self) -> u32 {
        match self {
            Self::Lane => 64,
            Self::Group => 1,
        }
    }
}

/// A kernel that is ready to run.
pub(super) struct Pipeline {
    pub kernel: &'static Kernel,
    pub pipeline: wgpu::ComputePipeline,
    /// Layout of group 1.
    pub storage: BindGroupLayout,
}

impl Pipeline {
    /// Group 1 with these buffers, in the order of the kernel's bindings. A buffer that the kernel
    /// writes must not occur twice.
    ///
    /// # Panics
    /// If their number is not that of the kernel's bindings, which is a mistake of the caller.
    pub fn bind(&self, device: &GpuDevice, storage: &[&wgpu::Buffer]) -> Result<wgpu::BindGroup> {
        self.bind_from(device, &storage.iter().map(|buffer| (*buffer, 0)).collect::<Vec<_>>())
    }

    /// The same with each buffer from a byte on, a multiple of 256.
    pub fn bind_from(
        &self,
        device: &GpuDevice,
        storage: &[(&wgpu::Buffer, u64)],
    ) -> Result<wgpu::BindGroup> {
        let name = self.kernel.name;
        assert_eq!(storage.len(), self.kernel.storage.len(), "{name}");
        for ((buffer, _), declared) in storage.iter().zip(self.kernel.storage) {
            let shared = storage.iter().filter(|(other, _)| other == buffer).count() > 1;
            if declared.write && shared {
                let what = format!("{name} that reads the buffer it writes");
                return Err(BackendError::Unsupported(what));
            }
        }
        let entries: Vec<wgpu::BindGroupEntry<'_>> = storage
            .iter()
            .zip(0..)
            .map(|((buffer, offset), binding)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer,
                    offset: *offset,
                    size: None,
                }),
            })
            .collect();
        device.scoped(name, 0, |wgpu| {
            wgpu.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(name),
                layout: &self.storage,
                entries: &entries,
            })
        })
    }
}

/// A device's pipelines, by kernel name.
pub(super) struct Pipelines {
    pub reduction: Reduction,
    /// The cooperative matrices that kernels may use, if any.
    pub cooperative: Option<Cooperative>,
    /// Layout of group 0.
    pub common: BindGroupLayout,
    /// Whether `unpack2x16float` keeps subnormals on this device.
    keeps_halves: AtomicBool,
    made: Mutex<HashMap<&'static str, Arc<Pipeline>>>,
    kept: OnceLock<Kept>,
}

/// The driver's compiled kernels, kept between runs.
struct Kept {
    cache: wgpu::PipelineCache,
    file: PipelineFile,
    /// Whether pipelines were made since the file was written.
    stale: AtomicBool,
}

/// A constant of kernels that need all f16s exactly (kernels/shared/pieces.wgsl).
const BY_HAND: &str = "by_hand";

impl Pipelines {
    pub fn new(
        device: &wgpu::Device,
        reduction: Reduction,
        cooperative: Option<Cooperative>,
    ) -> Self {
        let uniform = |binding, dynamic, bytes| {
            let ty = BindingType::Buffer {
                ty: BufferBindingType::Uniform,
                has_dynamic_offset: dynamic,
                min_binding_size: std::num::NonZeroU64::new(bytes),
            };
            BindGroupLayoutEntry { binding, visibility: ShaderStages::COMPUTE, ty, count: None }
        };
        let common = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("step and parameters"),
            entries: &[uniform(0, false, size_of::<Steps>() as u64), uniform(1, true, ARENA_SLOT)],
        });
        let keeps_halves = AtomicBool::new(false);
        let (made, kept) = (Mutex::default(), OnceLock::new());
        Self { reduction, cooperative, common, keeps_halves, made, kept }
    }

    /// From now on makes pipelines with the data of earlier runs in `file`.
    pub fn keep(&self, device: &wgpu::Device, file: PipelineFile) {
        let held = file.read();
        tracing::debug!("{} bytes of compiled kernels kept", held.as_ref().map_or(0, Vec::len));
        let cache = trusted::pipeline_cache(device, held.as_deref());
        // Only the first call counts.
        let _ = self.kept.set(Kept { cache, file, stale: AtomicBool::new(false) });
    }

    /// Writes what the driver compiled since the last call, if anything. If the file cannot be
    /// written, the next run only takes longer.
    pub fn save(&self) {
        let Some(kept) = self.kept.get().filter(|kept| kept.stale.swap(false, Ordering::Relaxed))
        else {
            return;
        };
        let Some(data) = kept.cache.get_data() else { return };
        if let Err(error) = kept.file.write(&data) {
            tracing::info!(
                "compiled kernels are not kept in {}: {error}",
                kept.file.path().display()
            );
        }
    }

    /// Sets whether kernels made from now on may unpack f16s with `unpack2x16float`.
    pub fn set_keeps_halves(&self, keeps: bool) {
        self.keeps_halves.store(keeps, Ordering::Relaxed);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The pipeline of a kernel, made on the first call.
    pub fn get(&self, device: &GpuDevice, name: &str) -> Result<Arc<Pipeline>> {
        let kernel = Kernel::find(name)
            .ok_or_else(|| BackendError::Unsupported(format!("there is no kernel {name}")))?;
        if !self.takes(kernel) {
            let what = format!("{name} on an adapter without its cooperative matrices");
            return Err(BackendError::Unsupported(what));
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = made.get(kernel.name) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(device.scoped(name, 0, |wgpu| self.make(wgpu, kernel))?);
        made.insert(kernel.name, Arc::clone(&pipeline));
        Ok(pipeline)
    }

    /// Whether the adapter supports what the kernel needs.
    pub fn takes(&self, kernel: &Kernel) -> bool {
        !kernel.cooperative || self.cooperative.is_some_and(|kind| kind.runs(kernel.name))
    }

    pub fn make(&self, device: &wgpu::Device, kernel: &'static Kernel) -> Pipeline {
        let label = Some(kernel.name);
        let entries: Vec<BindGroupLayoutEntry> = kernel
            .storage
            .iter()
            .zip(0..)
            .map(|(storage, binding)| BindGroupLayoutEntry {
                binding,
                visibility: ShaderStages::COMPUTE,
                ty: BindingType::Buffer {
                    ty: BufferBindingType::Storage { read_only: !storage.write },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let storage = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label,
            entries: &entries,
        });
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&self.common), Some(&storage)],
            immediate_size: 0,
        });
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(kernel.source.into()),
        });
        let by_hand = f64::from(!self.keeps_halves.load(Ordering::Relaxed));
        let constants = [(BY_HAND, by_hand)];
        let asks = kernel.source.contains("override by_hand");
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // The kernels write every element of workgroup memory that they read.
                zero_initialize_workgroup_memory: false,
                constants: if asks { &constants } else { &[] },
            },
            cache: self.kept.get().map(|kept| &kept.cache),
        });
        if let Some(kept) = self.kept.get() {
            kept.stale.store(true, Ordering::Relaxed);
        }
        Pipeline { kernel, pipeline, storage }
    }
}
