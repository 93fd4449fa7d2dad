//! The engine's only `unsafe` code. wgpu marks its experimental features and its pipeline
//! caches as unsafe.
//!
//! `Device::create_pipeline_cache` is unsafe because a driver may trust the given bytes blindly:
//! they must come from `get_data` of the same adapter and driver. Here they come from a file that
//! only this program writes, in a directory that belongs to the user, named after the adapter. The
//! file begins with the BLAKE3 of the rest, so truncated or damaged data is never passed on. wgpu
//! then compares its own header with adapter, driver version and layout, and starts with an empty
//! cache if they differ (`fallback`). Anyone who can write the user's files can also replace this
//! program.
//!
//! `ExperimentalFeatures::enabled` is unsafe because wgpu does not guarantee that such a feature is
//! sound in every driver. It is requested only together with cooperative matrices, only if the
//! adapter offers them, and only for kernels that this crate ships: their text is fixed when it is
//! built, their shapes are checked before the plan is made (`plan`, `batch`), they keep naga's
//! bounds checks for every buffer, and they load and store matrices only within workgroup memory
//! that they have filled, of sizes that are constants of the kernel. Kernels from elsewhere never
//! run with it.
#![allow(unsafe_code)]

/// The permission to request cooperative matrices from a device.
pub(super) fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: as argued above.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// A pipeline cache that starts with the data kept by an earlier run.
pub(super) fn pipeline_cache(device: &wgpu::Device, kept: Option<&[u8]>) -> wgpu::PipelineCache {
    let wanted =
        wgpu::PipelineCacheDescriptor { label: Some("kernels"), data: kept, fallback: true };
    // SAFETY: as argued above.
    unsafe { device.create_pipeline_cache(&wanted) }
}
