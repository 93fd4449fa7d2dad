//! `out[T, rows] = x[T, cols] . weight^T (+ bias)`.
//!
//! A few tokens: row by row (`row_dot`). More: tiles of rows and tokens (`gemm`).

use rayon::prelude::*;

use super::gemm::{self, Panels};
use super::matrix::Matrix;
use super::row_dot::{Input, RowDots};

/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 18;
/// Up to this many tokens are computed one by one.
const SINGLES_MAX: usize = 3;
/// Tasks per thread, so that a late thread takes fewer.
const TASKS_A_THREAD: usize = 4;

/// One matrix to multiply with: `out` is `[T, weight.rows]`, `bias` `[weight.rows]`.
pub struct Product<'a> {
    pub weight: Matrix<'a>,
    pub bias: Option<&'a [f32]>,
    pub out: &'a mut [f32],
}

/// `x` is `[T, weight.cols]`, `out` `[T, weight.rows]`, `bias` `[weight.rows]`.
pub fn linear(x: &[f32], weight: Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    linears(x, weight.cols, &mut [Product { weight, bias, out }]);
}

/// Several products with the same `x [T, cols]`, which is prepared once.
pub fn linears(x: &[f32], cols: usize, products: &mut [Product<'_>]) {
    let tokens = x.len() / cols;
    if tokens <= SINGLES_MAX {
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let types = products.iter().map(|product| product.weight.dtype);
            matvecs(&Input::new(x, types), products, t);
        }
    } else {
        let panels = Panels::new(x, cols);
        for product in &mut *products {
            gemm::matmul(&panels, product.weight, product.out);
        }
    }
    for Product { weight, bias, out } in products {
        let Some(bias) = bias else { continue };
        for row in out.chunks_exact_mut(weight.rows) {
            for (out, bias) in row.iter_mut().zip(*bias) {
                *out += bias;
            }
        }
    }
}

/// Token `t` of all products, in one parallel region. Each row's sum is computed in the same way in
/// whatever task.
fn matvecs(input: &Input, products: &mut [Product<'_>], t: usize) {
    let work: usize = products.iter().map(|p| p.weight.rows * p.weight.cols).sum();
    let threads = rayon::current_num_threads();
    let parallel = threads > 1 && work >= SERIAL_MAX;
    let mut tasks = Vec::with_capacity(threads * TASKS_A_THREAD + products.len());
    let share = if parallel { work / (threads * TASKS_A_THREAD) } else { work };
    for Product { weight, out, .. } in products {
        let weight = *weight;
        let rows = (share / weight.cols).max(8);
        let out = &mut out[t * weight.rows..(t + 1) * weight.rows];
        for (i, out) in out.chunks_mut(rows).enumerate() {
            tasks.push(RowDots { input, weight, first: i * rows, out });
        }
    }
    if parallel {
        tasks.into_par_iter().with_max_len(1).for_each(RowDots::run);
    } else {
        tasks.into_iter().for_each(RowDots::run);
    }
}
