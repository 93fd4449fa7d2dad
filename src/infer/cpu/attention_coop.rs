//! The same as [`attention`](super::attention::attention) over a cache of f16; the device's
//! form on cooperative matrices keeps queries and weights to 22 bits.

pub use super::attention::attention as attention_coop;
