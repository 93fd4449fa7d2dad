//! Several tokens against stored rows: a block of a few rows is unpacked once,
//! and meets all tokens from cache.
//!
//! Work is cut into tasks of [`TASK_ROWS`] rows and, within one, into depths of
//! [`DEPTH`] weights. The inner kernel keeps 6 rows by 8 or 16 tokens of sums in
//! registers (Goto and van de Geijn, 2008); each depth's sums are added to the
//! result, so rounding grows with the number of depths, not of weights.

use rayon::prelude::*;

use super::lanes::{self, Kernel, Lanes};
use super::matrix::Matrix;
use super::row_dot::eights;
use super::unpack::{half_at, unpack};
use doppler_store::DType;

/// Weights of a row taken at a time: a multiple of every block length.
const DEPTH: usize = 256;
/// Rows the inner kernel holds.
const ROWS: usize = 6;
/// Rows of one task: their unpacked depth stays in the second-level cache.
const TASK_ROWS: usize = 8 * ROWS;
/// Tokens and rows that are turned over together.
const TURN: usize = 16;
/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 18;

/// Tokens turned over: `[panel][depth][token]`, 8 or 16 tokens a panel, padded with zeros.
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

/// A few tokens' results out of `[rows][token]`, `out` being `[tokens, rows]`.
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

/// Rows `first..` of the product, into `[row][token]` with padded tokens; `N` vectors a panel.
struct Tile<'a, const N: usize> {
    x: &'a Panels,
    weight: Matrix<'a>,
    first: usize,
    /// All zeros.
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
        // The last group's missing rows stay zeros.
        let mut unpacked = vec![[[0.0; DEPTH]; ROWS]; count.div_ceil(ROWS)];
        for depth in 0..x.depths {
            // Whole blocks; what is past the row meets zeros of `x`.
            let cols = DEPTH.min(weight.padded_cols() - depth * DEPTH);
            for r in 0..count {
                let row = &weight.row(first + r)[depth * blocks..];
                let to = &mut unpacked[r / ROWS][r % ROWS];
                unpack_depth(l, weight.dtype, &row[..blocks.min(row.len())], &mut to[..cols]);
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

/// One depth of a row, whole blocks, to the bits of `unpack`'s for the two types that
/// most weights have: inside a tile the compiler makes no vectors of those loops.
#[inline(always)]
fn unpack_depth<L: Lanes>(l: L, dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q4K => {
            for (block, out) in bytes.as_chunks::<144>().0.iter().zip(out.as_chunks_mut().0) {
                q4_k(l, block, out);
            }
        }
        DType::Q6K => {
            for (block, out) in bytes.as_chunks::<210>().0.iter().zip(out.as_chunks_mut().0) {
                q6_k(l, block, out);
            }
        }
        _ => unpack(dtype, bytes, out),
    }
}

/// Eight six-bit scales and eight mins out of twelve bytes, times `d` and `dmin`.
#[inline(always)]
fn scales_mins<L: Lanes>(l: L, block: &[u8]) -> ([f32; 8], L::V) {
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let (a, b, c) = (word(4), word(8), word(12));
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let pair = |low: u32, high: u32| (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    let scales = pair(a & six, c & four | a >> 2 & two);
    let mins = pair(b & six, c >> 4 & four | b >> 2 & two);
    let (d, dmin) = (l.splat(half_at(block, 0)), l.splat(half_at(block, 2)));
    let number = |six_bits: [u8; 8]| l.signed(&bytemuck::cast(six_bits));
    (l.store(l.mul(d, number(scales))), l.mul(dmin, number(mins)))
}

#[inline(always)]
fn q4_k<L: Lanes>(l: L, block: &[u8; 144], out: &mut [f32; 256]) {
    let (scales, mins) = scales_mins(l, block);
    let mins = l.store(mins);
    let (quants, _) = block[16..].as_chunks::<8>();
    let (out, _) = out.as_chunks_mut::<8>();
    for pair in 0..4 {
        let (g, h) = (2 * pair, 2 * pair + 1);
        let scale = [l.splat(scales[g]), l.splat(scales[h])];
        let below = [l.splat(-mins[g]), l.splat(-mins[h])];
        for i in 0..4 {
            let numbers = l.nibbles(&quants[4 * pair + i]);
            for side in 0..2 {
                let weights = l.add(l.mul(scale[side], numbers[side]), below[side]);
                out[8 * pair + 4 * side + i] = l.store(weights);
            }
        }
    }
}

/// The levels of half a Q6_K block, less 32: four quarters.
#[inline(always)]
fn q6_levels(block: &[u8; 210], half: usize) -> [[i8; 32]; 4] {
    let rows = block.as_chunks::<32>().0;
    let (low0, low1, high) = (&rows[2 * half], &rows[2 * half + 1], &rows[4 + half]);
    let mut q = [[0_i8; 32]; 4];
    for i in 0..32 {
        q[0][i] = (low0[i] & 15 | (high[i] & 3) << 4).cast_signed() - 32;
        q[1][i] = (low1[i] & 15 | (high[i] >> 2 & 3) << 4).cast_signed() - 32;
        q[2][i] = (low0[i] >> 4 | (high[i] >> 4 & 3) << 4).cast_signed() - 32;
        q[3][i] = (low1[i] >> 4 | (high[i] >> 6) << 4).cast_signed() - 32;
    }
    q
}

/// `d * scale` of a Q6_K block's halves, 16 weights each.
#[inline(always)]
fn q6_scales<L: Lanes>(l: L, block: &[u8; 210]) -> [[f32; 8]; 2] {
    let d = l.splat(half_at(block, 208));
    let stored = block[192..].first_chunk::<16>().expect("in block");
    let stored: &[i8; 16] = bytemuck::cast_ref(stored);
    let [low, high] = [l.signed(&eights(stored)[0]), l.signed(&eights(stored)[1])];
    [l.store(l.mul(d, low)), l.store(l.mul(d, high))]
}

#[inline(always)]
fn q6_k<L: Lanes>(l: L, block: &[u8; 210], out: &mut [f32; 256]) {
    let scales = q6_scales(l, block);
    let (out, _) = out.as_chunks_mut::<8>();
    for half in 0..2 {
        for (quarter, q) in q6_levels(block, half).iter().enumerate() {
            for (i, q) in eights(q).iter().enumerate() {
                let scale = l.splat(scales[half][2 * quarter + i / 2]);
                out[16 * half + 4 * quarter + i] = l.store(l.mul(scale, l.signed(q)));
            }
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
