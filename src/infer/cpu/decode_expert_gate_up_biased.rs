//! [`decode_expert_gate_up`](super::decode_expert_gate_up::decode_expert_gate_up) with biases.

use super::gated::joined;
use super::matrix::Matrix;
use super::pack::{Packed, pack, packed_words, products};
use crate::graph::{Activation, ExpertLayout};

/// `ids` are the choices' experts, `biases` those of the layer, `[experts, ff, 2]`: each row's gate
/// and up.
pub fn decode_expert_gate_up_biased(
    x: &[u32],
    slots: &[&[u8]],
    layout: &ExpertLayout,
    routed: &[Option<(usize, f32)>],
    (ids, biases): (&[u32], &[f32]),
    activation: Activation,
    packed: &mut [u32],
) {
    let ff = layout.gate.rows;
    for ((route, id), packed) in
        routed.iter().zip(ids).zip(packed.chunks_exact_mut(packed_words(ff)))
    {
        let Some((slot, _)) = *route else { continue };
        let of = |spec| products(Packed::new(x), Matrix::new(spec, slots[slot])).into_iter();
        let biases = biases[*id as usize * 2 * ff..].as_chunks::<2>().0;
        let sums = of(&layout.gate).zip(of(&layout.up)).zip(biases);
        let inner = sums.map(|((gate, up), bias)| {
            let (gate, up) = (gate + f64::from(bias[0]), up + f64::from(bias[1]));
            joined(gate as f32, up as f32, activation)
        });
        pack(&inner.collect::<Vec<_>>(), packed);
    }
}
