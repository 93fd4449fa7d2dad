//! `out[T, rows] = x[T, cols] . weight^T (+ bias)`.
//!
//! A few tokens: row by row (`row_dot`). More: tiles of rows and tokens (`gemm`).

use rayon::prelude::*;

use super::gemm::{self, Panels};
use super::lanes;
use super::matrix::Matrix;
use super::row_dot::{Input, RowDots};

/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 17;
/// Up to this many tokens are taken one by one.
const SINGLES_MAX: usize = 3;

/// `x` is `[T, weight.cols]`, `out` `[T, weight.rows]`, `bias` `[weight.rows]`.
pub fn linear(x: &[f32], weight: Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    let (rows, cols) = (weight.rows, weight.cols);
    let tokens = x.len() / cols;
    debug_assert_eq!(out.len(), tokens * rows);
    if tokens <= SINGLES_MAX {
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(rows)) {
            matvec(&Input::new(x), weight, out);
        }
    } else {
        gemm::matmul(&Panels::new(x, cols), weight, out);
    }
    if let Some(bias) = bias {
        for row in out.chunks_exact_mut(rows) {
            for (out, bias) in row.iter_mut().zip(bias) {
                *out += bias;
            }
        }
    }
}

/// One token. Each row's sum is computed the same way whatever task it falls to.
pub fn matvec(input: &Input, weight: Matrix<'_>, out: &mut [f32]) {
    let threads = rayon::current_num_threads();
    if threads == 1 || weight.rows * weight.cols < SERIAL_MAX {
        lanes::run(RowDots { input, weight, first: 0, out });
        return;
    }
    let task = weight.rows.div_ceil(threads * 4).max(8);
    out.par_chunks_mut(task).enumerate().for_each(|(i, out)| {
        lanes::run(RowDots { input, weight, first: i * task, out });
    });
}
