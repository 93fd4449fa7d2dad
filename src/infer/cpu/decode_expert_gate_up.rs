//! The same as [`expert_gate_up`](super::expert_gate_up::expert_gate_up), over packed activations and for all
//! choices of one token.

pub use super::expert_gate_up::expert_gate_up as decode_expert_gate_up;
