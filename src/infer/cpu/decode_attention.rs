//! The same as [`attention`](super::attention::attention) together with `decode_combine`; the device's form
//! for one token shares the positions out and keeps a highest score and a sum of weights for each share.

pub use super::attention::attention as decode_attention;
