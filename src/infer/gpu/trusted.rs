//! The one place where `unsafe` is allowed: wgpu marks its experimental features and its pipeline caches so.
//!
//! `Device::create_pipeline_cache` is unsafe because a driver is given bytes that it may trust blindly: they must come
//! from `get_data` of the same adapter and driver. They come from a file that only this program writes, in a directory
//! of the user's own, named after the adapter; the file begins with the BLAKE3 of the rest, so that what was cut or
//! rotted is never passed on; wgpu then compares its own header with adapter, driver version and layout, and begins with an
//! empty cache where they differ (`fallback`). Who can write the user's files can also replace this program.
//!
//! `ExperimentalFeatures::enabled` is unsafe because wgpu does not vouch that such a feature
//! is sound in every driver it may meet. It is asked for only together with cooperative
//! matrices, only where the adapter offers them, and only for kernels that this crate
//! ships: their text is fixed when it is built, their shapes are checked before the plan is
//! made (`plan`, `batch`), they keep naga's bounds checks for every buffer, and they load and
//! store matrices only within workgroup memory that they have filled, of sizes that
//! are constants of the kernel. Kernels that come from elsewhere never run with it.
#![allow(unsafe_code)]

/// The permission to ask a device for cooperative matrices.
pub(super) fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: as argued above.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// A cache of pipelines that begins with what an earlier run kept.
pub(super) fn pipeline_cache(device: &wgpu::Device, kept: Option<&[u8]>) -> wgpu::PipelineCache {
    let wanted =
        wgpu::PipelineCacheDescriptor { label: Some("kernels"), data: kept, fallback: true };
    // SAFETY: as argued above.
    unsafe { device.create_pipeline_cache(&wanted) }
}
