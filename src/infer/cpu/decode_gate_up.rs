//! Two products and [`gated`](super::gated::gated); the device's form for one token does them in one dispatch.

pub use super::gated::gated as decode_gate_up;
