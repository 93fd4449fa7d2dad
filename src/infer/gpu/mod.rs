//! The wgpu backend: device, pools, pipelines, executor.
