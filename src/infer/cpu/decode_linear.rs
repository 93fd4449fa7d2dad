//! The same products as [`linears`](super::linear::linears); the device's form for one token takes
//! packed activations (kernels/shared/pack.wgsl) and adds to the stream where it is asked to.

pub use super::linear::linears as decode_linear;
