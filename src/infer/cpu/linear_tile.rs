//! The same product as [`linear`](super::linear::linear). The device's variant for many tokens sums
//! each element over the columns in order.

pub use super::linear::linear as linear_tile;
