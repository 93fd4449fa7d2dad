//! The same as [`expert_gate_up`](super::expert_gate_up::expert_gate_up). The device's variant for
//! many tokens unpacks a weight once for several of them; the sums are the same.

pub use super::expert_gate_up::expert_gate_up as expert_gate_up_tile;
