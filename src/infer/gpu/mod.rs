//! The wgpu backend: device, pools, pipelines, plan, executor.
//!
//! A graph becomes a plan once: for each op a list of dispatches, each with its pipeline, its bind
//! group and its slot of the parameter arena. A step then writes 16 bytes of step description and
//! the token ids, and replays the plan. Only a `Route`, whose choice the pager must see, ends a
//! submission. Kernels use plain WebGPU core, so every adapter runs the same ones, with two
//! exceptions where the adapter supports them: subgroups for one token's products, and cooperative
//! matrices of f16 for a prompt's. Timestamps are requested only for measuring.

mod batch;
mod biased;
mod buffers;
mod cooperative;
mod decode;
mod device;
mod dispatch;
mod encoder;
mod executor;
mod experts;
mod hush;
mod kernels;
mod lower;
mod params;
mod pipeline_file;
mod pipelines;
mod plan;
mod program;
mod readback;
mod recurrent;
mod repack;
mod sample;
mod spill;
mod supports;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) use tests::device as test_device;
mod tiles;
mod timing;
mod trusted;
mod weights;

pub use device::{AdapterChoice, GpuDevice};
pub use kernels::{KERNELS, Kernel, Storage};
pub use pipelines::Reduction;
pub use program::{Program, ProgramError, ProgramOptions};
