//! The same as [`attention`](super::attention::attention); the device's form for many tokens
//! differs in what shares the reading of the cache.

pub use super::attention::attention as attention_tile;
