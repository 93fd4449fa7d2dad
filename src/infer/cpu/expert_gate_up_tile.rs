//! The same as [`expert_gate_up`](super::expert_gate_up::expert_gate_up); the device's form
//! for many tokens differs in what shares the unpacking of a weight, never in a sum.

pub use super::expert_gate_up::expert_gate_up as expert_gate_up_tile;
