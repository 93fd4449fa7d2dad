//! Composes, validates and tabulates the WGSL kernels.

pub fn compile() {}
