//! The second half of an expert: `down . inner`, without the routing weight.

use super::linear::linear;
use super::matrix::Matrix;
use crate::graph::ExpertLayout;

/// `inner` is `[n, ff]`; returns `[n, hidden]`.
pub fn expert_down(inner: &[f32], layout: &ExpertLayout, expert: &[u8]) -> Vec<f32> {
    let tokens = inner.len() / layout.down.cols;
    let mut out = vec![0.0; tokens * layout.down.rows];
    linear(inner, Matrix::new(&layout.down, expert), None, &mut out);
    out
}
