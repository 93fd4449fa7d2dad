//! The same as [`expert_down`](super::expert_down::expert_down); the device's form for many
//! tokens differs in what shares the unpacking of a weight, never in a sum.

pub use super::expert_down::expert_down as expert_down_tile;
