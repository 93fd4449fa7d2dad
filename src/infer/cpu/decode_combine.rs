//! What `decode_attention`'s shares come to: on the CPU [`attention`](super::attention::attention) has
//! gone through all positions by itself.

pub use super::attention::attention as decode_combine;
