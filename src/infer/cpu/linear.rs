//! `out[T, rows] = x[T, cols] . weight^T (+ bias)`.
//!
//! A few tokens of a prompt, and those of several sequences: row by row (`row_dot`). More: tiles of
//! rows and tokens (`gemm`), which round differently. So which of them is used never depends on what
//! else is in a step of several sequences.

use rayon::prelude::*;

use super::gemm::{self, Panels};
use super::matrix::Matrix;
use super::row_dot::{Input, RowDots};

/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 18;
/// Up to this many tokens of one sequence are computed as single ones.
pub const SINGLES_MAX: usize = 3;
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
    let singles = x.len() / weight.cols <= SINGLES_MAX;
    linears(x, weight.cols, &mut [Product { weight, bias, out }], singles);
}

/// Several products with the same `x [T, cols]`, which is prepared once. With `singles`, each token's
/// results are the bits of a product of it alone.
pub fn linears(x: &[f32], cols: usize, products: &mut [Product<'_>], singles: bool) {
    if singles {
        let input = |x| Input::new(x, products.iter().map(|product| product.weight.dtype));
        let inputs: Vec<Input> = x.chunks_exact(cols).map(input).collect();
        matvecs(&inputs, products);
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

/// All products, in one parallel region. Each row's sum is computed in the same way in whatever task
/// and beside whatever other tokens; a row is read once for all of them.
fn matvecs(inputs: &[Input], products: &mut [Product<'_>]) {
    let work: usize = products.iter().map(|p| p.weight.rows * p.weight.cols).sum();
    let threads = rayon::current_num_threads();
    let parallel = threads > 1 && work * inputs.len() >= SERIAL_MAX;
    let mut tasks = Vec::with_capacity(threads * TASKS_A_THREAD + products.len());
    let share = if parallel { work / (threads * TASKS_A_THREAD) } else { work };
    for Product { weight, out, .. } in products {
        let weight = *weight;
        let rows = (share / weight.cols).max(8);
        let mut outs: Vec<_> =
            out.chunks_exact_mut(weight.rows).map(|out| out.chunks_mut(rows)).collect();
        for first in (0..weight.rows).step_by(rows) {
            let outs = outs.iter_mut().filter_map(Iterator::next).collect();
            tasks.push(RowDots { inputs, weight, first, outs });
        }
    }
    if parallel {
        tasks.into_par_iter().with_max_len(1).for_each(RowDots::run);
    } else {
        tasks.into_iter().for_each(RowDots::run);
    }
}
