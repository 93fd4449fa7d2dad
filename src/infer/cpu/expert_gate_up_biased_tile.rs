//! The same as [`expert_gate_up_biased`](super::expert_gate_up_biased::expert_gate_up_biased). The
//! device's variant for many tokens unpacks a weight once for several of them; the sums are the same.

pub use super::expert_gate_up_biased::expert_gate_up_biased as expert_gate_up_biased_tile;
