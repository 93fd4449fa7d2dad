//! [`decode_expert_down`](super::decode_expert_down::decode_expert_down) with a bias of each expert.

use super::matrix::Matrix;
use super::pack::{Packed, packed_words, products};
use crate::graph::ExpertLayout;

/// `ids` are the choices' experts, `biases` those of the layer, `[experts, hidden]`.
pub fn decode_expert_down_biased(
    x: &[u32],
    slots: &[&[u8]],
    layout: &ExpertLayout,
    routed: &[Option<(usize, f32)>],
    (ids, biases): (&[u32], &[f32]),
    adds: bool,
    result: &mut [f32],
) {
    let hidden = layout.down.rows;
    let mut sums = vec![0.0; hidden];
    let choices = x.chunks_exact(packed_words(layout.down.cols)).zip(routed).zip(ids);
    for ((x, route), id) in choices {
        let Some((slot, weight)) = *route else { return };
        let down = products(Packed::new(x), Matrix::new(&layout.down, slots[slot]));
        let biases = &biases[*id as usize * hidden..][..hidden];
        for ((sum, x), bias) in sums.iter_mut().zip(down).zip(biases) {
            *sum += f64::from(weight) * (x + f64::from(*bias));
        }
    }
    let before = |x: f32| if adds { f64::from(x) } else { 0.0 };
    result.iter_mut().zip(sums).for_each(|(x, sum)| *x = (before(*x) + sum) as f32);
}
