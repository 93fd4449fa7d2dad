//! [`decode_gate_up`] for each of one token's chosen experts, in their slots.

use super::decode_gate_up::decode_gate_up;
use super::matrix::Matrix;
use super::pack::packed_words;
use crate::graph::{Activation, ExpertLayout};

/// `x` is a packed vector (`pack`) of `hidden`. `slots` holds the experts' stored bytes, `routed`
/// for each choice the slot and the routing weight (`None` if the step is halted), `packed` for
/// each choice a packed vector of `ff`. A choice without a slot leaves its vector unchanged.
pub fn decode_expert_gate_up(
    x: &[u32],
    slots: &[&[u8]],
    layout: &ExpertLayout,
    routed: &[Option<(usize, f32)>],
    activation: Activation,
    packed: &mut [u32],
) {
    for (route, packed) in
        routed.iter().zip(packed.chunks_exact_mut(packed_words(layout.gate.rows)))
    {
        let Some((slot, _)) = *route else { continue };
        let matrices = [&layout.gate, &layout.up].map(|spec| Matrix::new(spec, slots[slot]));
        decode_gate_up(x, matrices, activation, packed);
    }
}
