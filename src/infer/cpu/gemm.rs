//! Products of stored rows and several tokens: a block of a few rows is unpacked once and
//! multiplied with all tokens while it is in the cache.
//!
//! Work is divided into tasks of [`TASK_ROWS`] rows, and each task into depths of [`DEPTH`]
//! weights. The inner kernel keeps the sums of 6 rows by 8 or 16 tokens in registers (Goto and van
//! de Geijn, 2008). Each depth's sums are added to the result, so the rounding error grows with the
//! number of depths, not of weights.

use rayon::prelude::*;

use super::lanes::{self, Kernel, Lanes};
use super::matrix::Matrix;
use crate::quant::{Format, Visit, visit};

/// Weights of a row that are used at a time. A multiple of every block length.
const DEPTH: usize = 256;
/// Rows of the inner kernel.
const ROWS: usize = 6;
/// Rows of one task. One unpacked depth of them fits the second-level cache.
const TASK_ROWS: usize = 8 * ROWS;
/// Tokens or rows that are transposed together.
const TURN: usize = 16;
/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 18;

/// Transposed activations: `[panel][depth][token]`, 8 or 16 tokens per panel, padded with zeros.
pub struct Panels {
    x: Vec<f32>,
    tokens: usize,
    width: usize,
    depths: usize,
}

impl Panels {
    /// `x` is `[T, cols]`.
    pub fn new(x: &[f32], cols: usize) -> Self {
        let tokens = x.len() / cols;
        let width = if tokens <= 8 { 8 } else { 16 };
        let depths = cols.div_ceil(DEPTH);
        let panel = depths * DEPTH * width;
        let mut packed = vec![0.0; tokens.div_ceil(width) * panel];
        let pack = |(packed, x): (&mut [f32], &[f32])| {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (packed, x) in packed.chunks_exact_mut(width).zip(x) {
                    packed[t] = *x;
                }
            }
        };
        if x.len() < SERIAL_MAX {
            packed.chunks_exact_mut(panel).zip(x.chunks(width * cols)).for_each(pack);
        } else {
            packed.par_chunks_exact_mut(panel).zip(x.par_chunks(width * cols)).for_each(pack);
        }
        Self { x: packed, tokens, width, depths }
    }
}

/// `out[T, rows] = x . weight^T`.
pub fn matmul(x: &Panels, weight: Matrix<'_>, out: &mut [f32]) {
    let (rows, padded) = (weight.rows, x.tokens.next_multiple_of(x.width));
    let mut by_row = vec![0.0; rows * padded];
    let task = |(i, out): (usize, &mut [f32])| {
        let first = i * TASK_ROWS;
        match x.width {
            8 => lanes::run(Tile::<1> { x, weight, first, out }),
            _ => lanes::run(Tile::<2> { x, weight, first, out }),
        }
    };
    let parallel = rows * weight.cols * x.tokens >= SERIAL_MAX;
    if parallel {
        by_row.par_chunks_mut(TASK_ROWS * padded).enumerate().for_each(task);
    } else {
        by_row.chunks_mut(TASK_ROWS * padded).enumerate().for_each(task);
    }
    let turn = |(i, out): (usize, &mut [f32])| turn_over(&by_row, padded, i * TURN, rows, out);
    if parallel {
        out.par_chunks_mut(TURN * rows).enumerate().for_each(turn);
    } else {
        out.chunks_mut(TURN * rows).enumerate().for_each(turn);
    }
}

/// Transposes the results of a few tokens from `[rows][token]` into `out`, `[tokens, rows]`.
fn turn_over(by_row: &[f32], padded: usize, first: usize, rows: usize, out: &mut [f32]) {
    let tokens = out.len() / rows;
    for block in (0..rows).step_by(TURN) {
        let block = block..(block + TURN).min(rows);
        for t in 0..tokens {
            let out = &mut out[t * rows..][block.clone()];
            for (row, out) in block.clone().zip(out) {
                *out = by_row[row * padded + first + t];
            }
        }
    }
}

/// Rows `first..` of the product, into `[row][token]` with padded tokens. A panel is `N` vectors.
struct Tile<'a, const N: usize> {
    x: &'a Panels,
    weight: Matrix<'a>,
    first: usize,
    /// Zeros at first.
    out: &'a mut [f32],
}

impl<const N: usize> Kernel for Tile<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { x, weight, first, out } = self;
        let padded = x.tokens.next_multiple_of(x.width);
        let count = out.len() / padded;
        let blocks = DEPTH / weight.dtype.block_len() * weight.dtype.block_bytes();
        // The last group's missing rows stay zero.
        let mut unpacked = vec![[[0.0; DEPTH]; ROWS]; count.div_ceil(ROWS)];
        for depth in 0..x.depths {
            // Whole blocks; weights past the row's end are multiplied by zeros of `x`.
            let cols = DEPTH.min(weight.padded_cols() - depth * DEPTH);
            for r in 0..count {
                let row = &weight.row(first + r)[depth * blocks..];
                let to = &mut unpacked[r / ROWS][r % ROWS];
                let depth = Depth { l, bytes: &row[..blocks.min(row.len())], out: &mut to[..cols] };
                visit(weight.dtype, depth);
                to[cols..].fill(0.0);
            }
            let panels = x.x.chunks_exact(x.depths * DEPTH * x.width);
            for (p, panel) in panels.enumerate() {
                let (panel, _) = panel.as_chunks::<8>().0.as_chunks::<N>();
                let (panel, _) = panel.as_chunks::<DEPTH>();
                for (group, unpacked) in unpacked.iter().enumerate() {
                    let sums = micro(l, unpacked, &panel[depth]);
                    let first = group * ROWS;
                    for (r, sums) in sums.iter().enumerate().take(count - first) {
                        let at = (first + r) * padded + p * x.width;
                        let (out, _) = out[at..at + x.width].as_chunks_mut::<8>();
                        for (out, sum) in out.iter_mut().zip(sums) {
                            *out = l.store(l.add(l.load(out), *sum));
                        }
                    }
                }
            }
        }
    }
}

/// One depth of a row, whole blocks.
struct Depth<'a, L> {
    l: L,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl<L: Lanes> Visit for Depth<'_, L> {
    type Output = ();

    #[inline(always)]
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) {
        let (blocks, outs) = (self.bytes.as_chunks().0, self.out.as_chunks_mut().0);
        for (block, out) in blocks.iter().zip(outs) {
            F::unpack_lanes(self.l, block, out);
        }
    }
}

/// `sums[r][token] = rows[r] . x[..][token]` over one depth.
#[inline(always)]
fn micro<L: Lanes, const N: usize>(
    l: L,
    rows: &[[f32; DEPTH]; ROWS],
    x: &[[[f32; 8]; N]; DEPTH],
) -> [[L::V; N]; ROWS] {
    let mut sums = [[l.splat(0.0); N]; ROWS];
    for (k, x) in x.iter().enumerate() {
        let mut tokens = [l.splat(0.0); N];
        for n in 0..N {
            tokens[n] = l.load(&x[n]);
        }
        for r in 0..ROWS {
            let weight = l.splat(rows[r][k]);
            for n in 0..N {
                sums[r][n] = l.fma(weight, tokens[n], sums[r][n]);
            }
        }
    }
    sums
}
