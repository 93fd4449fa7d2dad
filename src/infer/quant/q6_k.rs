//! Q6_K: 256 weights in 210 bytes: 128 bytes of low nibbles, 64 of high bit pairs, 16 signed 8-bit
//! scales (one per group of 16), f16 `d` last; `w = d * scale * (level - 32)`, levels `0..64`
//! (ggml's `block_q6_K`).

use half::f16;

use super::fit::{fit_symmetric, importance, scale_f16, sum, symmetric_levels};
use super::planes::{HALF, Move, Plane, copy, word};
use super::{Format, Layout, MAGNITUDE_MAX, Scales, spread};
use crate::cpu::k_dot::{Beside, Folded};
use crate::cpu::lanes::Lanes;
use crate::cpu::row_dot::eights;
use crate::cpu::unpack::half_at;
use crate::cpu::wide::Wide;
use doppler_store::DType;

const GROUP: usize = 16;
const GROUPS: usize = 16;
const HIGH: usize = 128;
const SCALES: usize = 192;
const D: usize = 208;

/// Byte and shift of the low nibble and of the high pair of weight `i`.
///
/// Each half of 128 weights has 64 low and 32 high bytes. Quarter `t` of a half
/// (32 weights) uses low bytes `32 * (t % 2)..`, nibble `t / 2`, and pair `t`.
const fn place(i: usize) -> (usize, usize, usize, usize) {
    let (half, t, l) = (i / 128, i % 128 / 32, i % 32);
    (64 * half + 32 * (t % 2) + l, 4 * (t / 2), HIGH + 32 * half + l, 2 * t)
}

pub struct Q6K;

impl Format<256, 210> for Q6K {
    const LAYOUT: Layout = Layout {
        group: GROUP,
        levels: -32..32,
        values: &[],
        quants: 0..SCALES,
        scales: Scales::Halves(&[D]),
        max: MAGNITUDE_MAX,
        error: 0.020,
        narrow: Some(DType::Q8_0),
    };

    fn read(block: &[u8; 210], out: &mut [f32; 256]) {
        let d = f16::from_le_bytes([block[D], block[D + 1]]).to_f32();
        for (i, out) in out.iter_mut().enumerate() {
            let (low, low_shift, high, high_shift) = place(i);
            let level = block[low] >> low_shift & 15 | (block[high] >> high_shift & 3) << 4;
            let scale = block[SCALES + i / GROUP].cast_signed();
            *out = d * f32::from(scale) * (f32::from(level) - 32.0);
        }
    }

    fn write(weights: &[f32; 256]) -> [u8; 210] {
        let x: &[[f32; GROUP]; GROUPS] = bytemuck::cast_ref(weights);
        let w = x.each_ref().map(importance);
        let ideal: [f32; GROUPS] = std::array::from_fn(|g| fit_symmetric(&x[g], &w[g], 32.0));
        // The scale of largest magnitude becomes -128, the end of the range without an opposite.
        let peak =
            ideal.iter().copied().fold(0.0_f32, |a, b| if b.abs() > a.abs() { b } else { a });
        let d = scale_f16(peak / -128.0);
        let scales = choose_scales(x, &w, &ideal, d);
        let d = refit(x, &w, &scales, d);
        let scales = choose_scales(x, &w, &ideal, d);
        pack(x, &scales, d)
    }

    /// Each half of a block has 128 weights, in four runs of 32 that share bytes. Chunk `c` of 64
    /// weights is runs `2 c` and `2 c + 1`.
    fn planes() -> Vec<Plane> {
        let (mut low, mut high) = (Vec::new(), Vec::new());
        for (n, c, second) in (0..8).map(|i| (i / 4, i / 2 % 2, i % 2)) {
            let piece = 4 * n + 2 * c;
            low.push(Move {
                to: word(HALF * piece),
                from: word(64 * n + 32 * second),
                bytes: 32,
                mask: 15 << (4 * c),
                shift: 4 * second as i8 - 4 * c as i8,
            });
            for (half, k) in (0..8).map(|i| (i / 4, i % 4)) {
                let bit = 2 * (2 * c + second);
                high.push(Move {
                    to: word(8 * (piece + half) + 4 * second),
                    from: word(HIGH + 32 * n + HALF * half + 4 * k),
                    bytes: 4,
                    mask: 3 << bit,
                    shift: 2 * k as i8 - bit as i8,
                });
            }
        }
        let (low, high) = (Plane { bytes: 128, moves: low }, Plane { bytes: 64, moves: high });
        vec![low, high, copy(SCALES, 16), copy(D, 2)]
    }

    fn random(std: f32) -> Vec<f32> {
        vec![std / (spread(256.0) * spread(64.0))]
    }

    /// Levels are assembled as bytes before any is converted, which is seven times as fast as one
    /// loop that does both.
    #[inline(always)]
    fn unpack(block: &[u8; 210], out: &mut [f32; 256]) {
        let d = half_at(block, 208);
        let (rows, _) = block.as_chunks::<32>();
        let mut levels = [0; 256];
        for (half, levels) in levels.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let (low0, low1, high) = (&rows[2 * half], &rows[2 * half + 1], &rows[4 + half]);
            for i in 0..32 {
                levels[i] = low0[i] & 15 | (high[i] & 3) << 4;
                levels[32 + i] = low1[i] & 15 | (high[i] >> 2 & 3) << 4;
                levels[64 + i] = low0[i] >> 4 | (high[i] >> 4 & 3) << 4;
                levels[96 + i] = low1[i] >> 4 | (high[i] >> 6) << 4;
            }
        }
        let groups = levels.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0);
        for ((levels, out), scale) in groups.zip(&block[192..208]) {
            let scale = d * f32::from(scale.cast_signed());
            for i in 0..16 {
                out[i] = scale * (f32::from(levels[i]) - 32.0);
            }
        }
    }

    #[inline(always)]
    fn unpack_lanes<L: Lanes>(l: L, block: &[u8; 210], out: &mut [f32; 256]) {
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

    const WIDE: Option<Beside> = Some(Beside::Centre);

    #[inline(always)]
    fn wide_dot<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
        let mut acc = [w.splat16(0.0); 2];
        let blocks = row.as_chunks::<210>().0.iter().zip(input.x.as_chunks::<4>().0);
        for ((block, x), centre) in blocks.zip(&input.centre) {
            w.prefetch(block);
            let scales = wide_scales(w, block);
            acc[0] = w.fma16(scales, w.load16(centre), acc[0]);
            for half in 0..2 {
                let levels = wide_levels(w, block, half);
                for side in 0..2 {
                    let chunk = 2 * half + side;
                    let first = 4 * chunk as u8;
                    let scale = w.fours(scales, [first, first + 1, first + 2, first + 3]);
                    let sum = w.dots(levels[side], 0x3f, &x[chunk]);
                    acc[side] = w.fma16(scale, sum, acc[side]);
                }
            }
        }
        w.sum16(w.add16(acc[0], acc[1]))
    }
}

/// The levels of half a Q6_K block minus 32, in four quarters.
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

/// `d * scale` of each group of 16 weights in a Q6_K block's halves.
#[inline(always)]
fn q6_scales<L: Lanes>(l: L, block: &[u8; 210]) -> [[f32; 8]; 2] {
    let d = l.splat(half_at(block, 208));
    let stored = block[192..].first_chunk::<16>().expect("in block");
    let stored: &[i8; 16] = bytemuck::cast_ref(stored);
    let [low, high] = [l.signed(&eights(stored)[0]), l.signed(&eights(stored)[1])];
    [l.store(l.mul(d, low)), l.store(l.mul(d, high))]
}

/// A Q6_K block's `d`, times its sixteen scales.
#[inline(always)]
fn wide_scales<W: Wide>(w: W, block: &[u8; 210]) -> W::W {
    let stored: &[u8; 16] = block[192..].first_chunk().expect("in block");
    w.scaled(bytemuck::cast_ref(stored), half_at(block, 208))
}

/// The levels of half a Q6_K block, from which 32 is still to be subtracted: 64 and 64 bytes.
#[inline(always)]
fn wide_levels<W: Wide>(w: W, block: &[u8; 210], half: usize) -> [W::Words; 2] {
    let low = w.words(&block.as_chunks().0[half]);
    let high = w.twice(&block.as_chunks().0[4 + half]);
    let (four, two) = (0x0f0f_0f0f, 0x3030_3030);
    [
        w.or(w.and(low, four), w.and(w.left(high, [4, 2]), two)),
        w.or(w.and(w.right(low, [4, 4]), four), w.and(w.right(high, [0, 2]), two)),
    ]
}

/// The nearest signed levels of one group.
fn nearest(x: &[f32; GROUP], step: f32) -> [f32; GROUP] {
    if step == 0.0 { [0.0; GROUP] } else { symmetric_levels(x, step.recip(), 32.0) }
}

fn error(x: &[f32; GROUP], w: &[f32; GROUP], step: f32) -> f32 {
    let levels = nearest(x, step);
    sum::<GROUP>(|i| {
        let e = step * levels[i] - x[i];
        w[i] * e * e
    })
}

/// Chooses for each group the 8-bit scale near the ideal one that has the least error.
fn choose_scales(
    x: &[[f32; GROUP]; GROUPS],
    w: &[[f32; GROUP]; GROUPS],
    ideal: &[f32; GROUPS],
    d: f16,
) -> [i8; GROUPS] {
    let d = d.to_f32();
    std::array::from_fn(|g| {
        let middle = if d == 0.0 { 0.0 } else { (ideal[g] / d).round() };
        let mut best = (f32::INFINITY, 0_i8);
        for step in [0.0, -1.0, 1.0] {
            let scale = (middle + step).clamp(-128.0, 127.0);
            let error = error(&x[g], &w[g], d * scale);
            if error < best.0 {
                best = (error, scale as i8); // -128..=127
            }
        }
        best.1
    })
}

/// The d that fits these scales and their levels best.
fn refit(
    x: &[[f32; GROUP]; GROUPS],
    w: &[[f32; GROUP]; GROUPS],
    scales: &[i8; GROUPS],
    d: f16,
) -> f16 {
    let (mut xu, mut uu) = (0.0_f64, 0.0_f64);
    for g in 0..GROUPS {
        let scale = f32::from(scales[g]);
        let levels = nearest(&x[g], d.to_f32() * scale);
        let (mut gxu, mut guu) = (0.0_f32, 0.0_f32);
        for i in 0..GROUP {
            let u = scale * levels[i];
            gxu += w[g][i] * x[g][i] * u;
            guu += w[g][i] * u * u;
        }
        xu += f64::from(gxu);
        uu += f64::from(guu);
    }
    let fitted = f16::from_f64(xu / uu);
    let loss = |d: f16| {
        let step = |g: usize| d.to_f32() * f32::from(scales[g]);
        (0..GROUPS).map(|g| error(&x[g], &w[g], step(g))).sum::<f32>()
    };
    if uu > 0.0 && fitted.is_finite() && loss(fitted) < loss(d) { fitted } else { d }
}

fn pack(x: &[[f32; GROUP]; GROUPS], scales: &[i8; GROUPS], d: f16) -> [u8; 210] {
    let mut out = [0; 210];
    out[D..].copy_from_slice(&d.to_le_bytes());
    for g in 0..GROUPS {
        out[SCALES + g] = scales[g].cast_unsigned();
        let levels = nearest(&x[g], d.to_f32() * f32::from(scales[g]));
        for (i, signed) in levels.iter().enumerate() {
            let level = (signed + 32.0) as u8; // 0..64
            let (low, low_shift, high, high_shift) = place(GROUP * g + i);
            out[low] |= (level & 15) << low_shift;
            out[high] |= (level >> 4) << high_shift;
        }
    }
    out
}
