//! [`expert_down`](super::expert_down::expert_down) and [`expert_sum`](super::expert_sum::expert_sum); the device's form for
//! one token weighs and adds the choices up, in their order, while it multiplies.

pub use super::expert_down::expert_down as decode_expert_down;
pub use super::expert_sum::expert_sum as decode_expert_sum;
