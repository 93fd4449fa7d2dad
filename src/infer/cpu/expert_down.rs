//! The second half of an expert: `down . inner`, without the routing weight.

use super::linear::{Product, linears};
use super::matrix::Matrix;
use crate::graph::ExpertLayout;

/// `inner` is `[n, ff]`; returns `[n, hidden]`. `singles` as in `linears`.
pub fn expert_down(inner: &[f32], layout: &ExpertLayout, expert: &[u8], singles: bool) -> Vec<f32> {
    let tokens = inner.len() / layout.down.cols;
    let mut out = vec![0.0; tokens * layout.down.rows];
    let weight = Matrix::new(&layout.down, expert);
    let products = &mut [Product { weight, bias: None, out: &mut out }];
    linears(inner, layout.down.cols, products, singles);
    out
}
