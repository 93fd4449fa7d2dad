//! One token's products with up to three matrices, from packed activations.

use super::matrix::Matrix;
use super::pack::{Packed, products};

/// One matrix of the dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    pub weight: Matrix<'a>,
    /// Where its rows begin in `result` and in the biases.
    pub result_at: usize,
}

/// `result[at + row] (+)= weight[row] . x (+ bias[at + row])` for each segment. `x` is a packed
/// vector (`pack`) as long as the matrices have columns. If it `adds`, results are added to
/// `result`. Elements that belong to no segment are left unchanged.
pub fn decode_linear(
    x: &[u32],
    weights: &[Segment<'_>],
    bias: Option<&[f32]>,
    adds: bool,
    result: &mut [f32],
) {
    for segment in weights {
        let at = segment.result_at;
        for (i, product) in (at..).zip(products(Packed::new(x), segment.weight)) {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[i]));
            let before = if adds { f64::from(result[i]) } else { 0.0 };
            result[i] = (product + bias + before) as f32;
        }
    }
}
