//! [`expert_gate_up`](super::expert_gate_up::expert_gate_up) as cooperative matrices compute it.

use super::gated::gated;
use super::linear_coop::linear_coop;
use super::matrix::Matrix;
use crate::graph::{Activation, ExpertLayout};

/// `x` is `[n, hidden]`, the tokens that chose this expert; returns `[n, ff]`.
pub fn expert_gate_up_coop(
    x: &[f32],
    layout: &ExpertLayout,
    expert: &[u8],
    activation: Activation,
) -> Vec<f32> {
    let tokens = x.len() / layout.gate.cols;
    let mut gate = vec![0.0; tokens * layout.gate.rows];
    let mut up = vec![0.0; tokens * layout.up.rows];
    linear_coop(x, Matrix::new(&layout.gate, expert), None, &mut gate);
    linear_coop(x, Matrix::new(&layout.up, expert), None, &mut up);
    gated(&mut gate, &up, activation);
    gate
}
