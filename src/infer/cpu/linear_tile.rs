//! The same product as [`linear`](super::linear::linear); the device's form for many tokens
//! sums each element over the columns in order.

pub use super::linear::linear as linear_tile;
