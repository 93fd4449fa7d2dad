//! `out[T, rows] = x[T, cols] . weight^T (+ bias)`.
//!
//! One token: rows are split over threads and unpacked block by block in cache.
//! Several: a task unpacks a few rows once and meets all tokens with them.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::matrix::Matrix;
use super::simd::{self, Accumulator};
use super::unpack::unpack;

/// Weights unpacked at a time: a multiple of every block length, small enough for L1.
const CHUNK: usize = 512;
/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 15;
/// Rows that one task of a batch unpacks.
const TASK_ROWS: usize = 16;

/// `x` is `[T, weight.cols]`, `out` `[T, weight.rows]`, `bias` `[weight.rows]`.
pub fn linear(x: &[f32], weight: Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    let (rows, cols) = (weight.rows, weight.cols);
    let tokens = x.len() / cols;
    debug_assert_eq!(out.len(), tokens * rows);
    if tokens == 1 {
        matvec(x, weight, out);
    } else {
        matmul(x, weight, tokens, out);
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
pub fn matvec(x: &[f32], weight: Matrix<'_>, out: &mut [f32]) {
    let arch = Arch::new();
    let threads = rayon::current_num_threads();
    if threads == 1 || weight.rows * weight.cols < SERIAL_MAX {
        arch.dispatch(RowDots { x, weight, first: 0, out });
        return;
    }
    let task = weight.rows.div_ceil(threads * 4).max(8);
    out.par_chunks_mut(task).enumerate().for_each(|(i, out)| {
        arch.dispatch(RowDots { x, weight, first: i * task, out });
    });
}

/// `out[i] = weight[first + i] . x`.
pub struct RowDots<'a> {
    pub x: &'a [f32],
    pub weight: Matrix<'a>,
    pub first: usize,
    pub out: &'a mut [f32],
}

impl WithSimd for RowDots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, weight, first, out } = self;
        let chunk_bytes = CHUNK / weight.dtype.block_len() * weight.dtype.block_bytes();
        let mut unpacked = [0.0; CHUNK];
        for (i, out) in out.iter_mut().enumerate() {
            let mut acc = Accumulator::new(simd);
            let blocks = weight.row(first + i).chunks(chunk_bytes);
            for (blocks, x) in blocks.zip(x.chunks(CHUNK)) {
                let padded = x.len().next_multiple_of(weight.dtype.block_len());
                unpack(weight.dtype, blocks, &mut unpacked[..padded]);
                acc.add(simd, &unpacked, x);
            }
            *out = acc.sum(simd);
        }
    }
}

/// Several tokens: into `[rows, T]`, where a task's rows are its own, then turned over.
fn matmul(x: &[f32], weight: Matrix<'_>, tokens: usize, out: &mut [f32]) {
    let (rows, cols) = (weight.rows, weight.cols);
    let arch = Arch::new();
    let mut by_row = vec![0.0; rows * tokens];
    let task = |(i, out): (usize, &mut [f32])| {
        let first = i * TASK_ROWS;
        let count = out.len() / tokens;
        let mut unpacked = vec![0.0; count * weight.padded_cols()];
        arch.dispatch(RowTile { x, weight, first, unpacked: &mut unpacked, out });
    };
    if rows * cols * tokens < SERIAL_MAX {
        by_row.chunks_mut(TASK_ROWS * tokens).enumerate().for_each(task);
    } else {
        by_row.par_chunks_mut(TASK_ROWS * tokens).enumerate().for_each(task);
    }
    for (t, out) in out.chunks_exact_mut(rows).enumerate() {
        for (r, out) in out.iter_mut().enumerate() {
            *out = by_row[r * tokens + t];
        }
    }
}

/// `out[i][t] = weight[first + i] . x[t]` for a few rows and all tokens.
struct RowTile<'a> {
    x: &'a [f32],
    weight: Matrix<'a>,
    first: usize,
    /// Room for the rows, unpacked.
    unpacked: &'a mut [f32],
    out: &'a mut [f32],
}

impl WithSimd for RowTile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, weight, first, unpacked, out } = self;
        let cols = weight.cols;
        let stride = weight.padded_cols();
        let (tokens, count) = (x.len() / cols, unpacked.len() / stride);
        for (i, row) in unpacked.chunks_exact_mut(stride).enumerate() {
            unpack(weight.dtype, weight.row(first + i), row);
        }
        let row = |r: usize| &unpacked[r * stride..r * stride + cols];
        let token = |t: usize| &x[t * cols..(t + 1) * cols];
        let mut store = |r: usize, t: usize, value: f32| out[r * tokens + t] = value;
        let (row_fours, token_pairs) = (count / 4 * 4, tokens / 2 * 2);
        for t in (0..token_pairs).step_by(2) {
            let xs = [token(t), token(t + 1)];
            for r in (0..row_fours).step_by(4) {
                let sums = simd::tile(simd, [row(r), row(r + 1), row(r + 2), row(r + 3)], xs);
                for (i, pair) in sums.iter().enumerate() {
                    store(r + i, t, pair[0]);
                    store(r + i, t + 1, pair[1]);
                }
            }
            for r in row_fours..count {
                let [pair] = simd::tile(simd, [row(r)], xs);
                store(r, t, pair[0]);
                store(r, t + 1, pair[1]);
            }
        }
        for t in token_pairs..tokens {
            for r in 0..count {
                let [[sum]] = simd::tile(simd, [row(r)], [token(t)]);
                store(r, t, sum);
            }
        }
    }
}
