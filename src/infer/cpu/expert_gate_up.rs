//! The first half of an expert: `act(gate . x) * (up . x)`.

use super::gated::gated;
use super::linear::{Product, linears};
use super::matrix::Matrix;
use crate::graph::{Activation, ExpertLayout};

/// `x` is `[n, hidden]`, the tokens that chose this expert; returns `[n, ff]`. `singles` as in
/// `linears`.
pub fn expert_gate_up(
    x: &[f32],
    layout: &ExpertLayout,
    expert: &[u8],
    activation: Activation,
    singles: bool,
) -> Vec<f32> {
    let tokens = x.len() / layout.gate.cols;
    let mut gate = vec![0.0; tokens * layout.gate.rows];
    let mut up = vec![0.0; tokens * layout.up.rows];
    let products = &mut [
        Product { weight: Matrix::new(&layout.gate, expert), bias: None, out: &mut gate },
        Product { weight: Matrix::new(&layout.up, expert), bias: None, out: &mut up },
    ];
    linears(x, layout.gate.cols, products, singles);
    gated(&mut gate, &up, activation);
    gate
}
