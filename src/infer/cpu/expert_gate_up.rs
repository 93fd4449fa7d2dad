//! The first half of an expert: `act(gate . x) * (up . x)`.

use super::gated::gated;
use super::linear::linear;
use super::matrix::Matrix;
use crate::infer::graph::{Activation, ExpertLayout};

/// `x` is `[n, hidden]`, the tokens that chose this expert; returns `[n, ff]`.
pub fn expert_gate_up(
    x: &[f32],
    layout: &ExpertLayout,
    expert: &[u8],
    activation: Activation,
) -> Vec<f32> {
    let tokens = x.len() / layout.gate.cols;
    let mut gate = vec![0.0; tokens * layout.gate.rows];
    let mut up = vec![0.0; tokens * layout.up.rows];
    linear(x, Matrix::new(&layout.gate, expert), None, &mut gate);
    linear(x, Matrix::new(&layout.up, expert), None, &mut up);
    gated(&mut gate, &up, activation);
    gate
}
