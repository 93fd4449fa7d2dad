//! `act(gate . x) * (up . x)` for one token of each of several sequences: each row as
//! [`decode_gate_up`] computes it alone.

use super::decode_gate_up::decode_gate_up;
use super::matrix::Matrix;
use crate::graph::Activation;

/// `rows` are each token's packed activations and its packed results.
pub fn rows_gate_up(
    rows: &mut [(&[u32], &mut [u32])],
    matrices: [Matrix<'_>; 2],
    activation: Activation,
) {
    for (x, packed) in rows {
        decode_gate_up(x, matrices, activation, packed);
    }
}
