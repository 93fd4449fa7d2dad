//! Leave to use features that wgpu calls experimental. For now it is not given.

/// Whether experimental features may be asked for.
pub fn experimental() -> wgpu::ExperimentalFeatures {
    wgpu::ExperimentalFeatures::disabled()
}
