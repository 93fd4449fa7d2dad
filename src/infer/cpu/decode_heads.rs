//! [`rms_norm`](super::rms_norm::rms_norm) of each head (where the model has it), [`rope`](super::rope::rope) and
//! [`kv_write`](super::kv_write::kv_write) one after the other; the device's form for one token does them in one dispatch.

pub use super::kv_write::kv_write as decode_heads_write;
pub use super::rope::rope as decode_heads_turn;
