//! The one place where `unsafe` is allowed: wgpu marks its experimental features so.
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
