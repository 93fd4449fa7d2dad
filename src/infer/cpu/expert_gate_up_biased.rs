//! [`expert_gate_up`](super::expert_gate_up::expert_gate_up) with biases.

use super::gated::joined;
use super::linear::{Product, linears};
use super::matrix::Matrix;
use crate::graph::{Activation, ExpertLayout};

/// `biases` are this expert's, `[ff, 2]`: each row's gate and up.
pub fn expert_gate_up_biased(
    x: &[f32],
    layout: &ExpertLayout,
    expert: &[u8],
    biases: &[f32],
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
    let biases = biases.as_chunks::<2>().0.iter().cycle();
    for ((gate, up), bias) in gate.iter_mut().zip(&up).zip(biases) {
        *gate = joined(*gate + bias[0], up + bias[1], activation);
    }
    gate
}
