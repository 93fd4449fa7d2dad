//! [`rms_norm`](super::rms_norm::rms_norm) of each head (where the model has it), [`rope`](super::rope::rope),
//! [`kv_write`](super::kv_write::kv_write) and [`attention`](super::attention::attention) one after the other; the device's
//! form for one token does them in one dispatch, and shares the positions out: `decode_combine` does the rest.

pub use super::attention::attention as decode_attention;
pub use super::kv_write::kv_write as decode_attention_write;
pub use super::rope::rope as decode_attention_turn;
