//! The same as [`attention_sinks`](super::attention_sinks::attention_sinks). The device's variant for
//! many tokens reads the cache once for several of them; the sums are the same.

pub use super::attention_sinks::attention_sinks as attention_sinks_tile;
