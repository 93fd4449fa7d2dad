//! The second half of one token's experts: down projections, weighted and summed.

use super::matrix::Matrix;
use super::pack::{Packed, packed_words, products};
use crate::graph::ExpertLayout;

/// `result[hidden] = sum of weight * (down . inner)` over the choices, added to the old `result` if
/// it `adds`. `x` holds for each choice a packed vector (`pack`) of `ff`, `slots` the experts'
/// stored bytes, `routed` for each choice the slot and the routing weight. A halted step's choices
/// are all `None` and change nothing.
pub fn decode_expert_down(
    x: &[u32],
    slots: &[&[u8]],
    layout: &ExpertLayout,
    routed: &[Option<(usize, f32)>],
    adds: bool,
    result: &mut [f32],
) {
    let mut sums = vec![0.0; layout.down.rows];
    for (x, route) in x.chunks_exact(packed_words(layout.down.cols)).zip(routed) {
        let Some((slot, weight)) = *route else { return };
        let down = products(Packed::new(x), Matrix::new(&layout.down, slots[slot]));
        sums.iter_mut().zip(down).for_each(|(sum, x)| *sum += f64::from(weight) * x);
    }
    let before = |x: f32| if adds { f64::from(x) } else { 0.0 };
    result.iter_mut().zip(sums).for_each(|(x, sum)| *x = (before(*x) + sum) as f32);
}
