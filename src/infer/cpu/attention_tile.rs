//! The same as [`attention`](super::attention::attention). The device's variant for many tokens
//! only reads the cache for several queries at once.

pub use super::attention::attention as attention_tile;
