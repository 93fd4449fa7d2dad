//! The same as [`attention`](super::attention::attention) over an f16 cache. The device's variant
//! for cooperative matrices keeps 22 bits of queries and weights.

pub use super::attention::attention as attention_coop;
