//! [`expert_down`](super::expert_down::expert_down) as cooperative matrices compute it.

use super::linear_coop::linear_coop;
use super::matrix::Matrix;
use crate::graph::ExpertLayout;

/// `inner` is `[n, ff]`; returns `[n, hidden]`.
pub fn expert_down_coop(inner: &[f32], layout: &ExpertLayout, expert: &[u8]) -> Vec<f32> {
    let tokens = inner.len() / layout.down.cols;
    let mut out = vec![0.0; tokens * layout.down.rows];
    linear_coop(inner, Matrix::new(&layout.down, expert), None, &mut out);
    out
}
