//! `act(gate . x) * (up . x)` for one token, from packed activations to packed ones.

use super::gated::activate;
use super::matrix::Matrix;
use super::pack::{Packed, pack, products};
use crate::graph::Activation;

/// `x` is a packed vector (`pack`) as long as the matrices have columns, `packed` as they have
/// rows.
pub fn decode_gate_up(
    x: &[u32],
    [gate, up]: [Matrix<'_>; 2],
    activation: Activation,
    packed: &mut [u32],
) {
    let gates = products(Packed::new(x), gate).into_iter();
    let ups = products(Packed::new(x), up);
    let inner = gates.zip(ups).map(|(gate, up)| activate(gate as f32, activation) * up as f32);
    pack(&inner.collect::<Vec<_>>(), packed);
}
