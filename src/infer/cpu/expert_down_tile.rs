//! The same as [`expert_down`](super::expert_down::expert_down). The device's variant for many
//! tokens unpacks a weight once for several of them; the sums are the same.

pub use super::expert_down::expert_down as expert_down_tile;
