//! Products of one token of each of several sequences with up to three matrices: each row as
//! [`decode_linear`] computes it alone.

use super::decode_linear::{Segment, decode_linear};

/// `rows` are each token's packed activations and its results.
pub fn rows_linear(
    rows: &mut [(&[u32], &mut [f32])],
    weights: &[Segment<'_>],
    bias: Option<&[f32]>,
    adds: bool,
) {
    for (x, result) in rows {
        decode_linear(x, weights, bias, adds, result);
    }
}
