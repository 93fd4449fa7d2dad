//! The super-block of Q4_K and Q5_K: 256 weights in eight groups of 32,
//! `w = d * scale * level - dmin * min`, with 6-bit scales and mins and f16 `d`, `dmin` (ggml's
//! `block_q4_K`, `block_q5_K`).

use half::f16;

use super::fit::{affine_error, affine_levels, fit_affine, importance, scale_f16};
use super::spread;
use crate::cpu::lanes::Lanes;
use crate::cpu::unpack::half_at;

/// Weights of a group.
pub const GROUP: usize = 32;
const GROUPS: usize = 8;
/// The largest 6-bit value.
const SIX: f32 = 63.0;
/// How often scales and super-scales are fitted alternately.
const ROUNDS: usize = 2;

/// What a super-block stores, unpacked. Levels are `0..=15` or `0..=31`.
#[derive(Debug, Clone, PartialEq)]
pub struct Affine {
    pub d: f16,
    pub dmin: f16,
    pub scales: [u8; GROUPS],
    pub mins: [u8; GROUPS],
}

impl Affine {
    /// Multiplier and offset of each group: `w = a * level - b`.
    pub fn groups(&self) -> [(f32, f32); GROUPS] {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        std::array::from_fn(|g| (d * f32::from(self.scales[g]), dmin * f32::from(self.mins[g])))
    }

    /// The first four fields of a block: d, dmin and twelve bytes of scales and mins.
    ///
    /// Byte `g < 4` holds scale `g` in its low six bits and the two high bits of scale `g + 4`
    /// above them. Byte `g + 4` holds the same for mins. Byte `g + 8` holds the low four bits of
    /// scale `g + 4` and of min `g + 4`.
    pub fn header(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..2].copy_from_slice(&self.d.to_le_bytes());
        out[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        for g in 0..4 {
            let (scale, min) = (self.scales[g + 4], self.mins[g + 4]);
            out[4 + g] = self.scales[g] | (scale >> 4) << 6;
            out[8 + g] = self.mins[g] | (min >> 4) << 6;
            out[12 + g] = scale & 15 | (min & 15) << 4;
        }
        out
    }

    pub fn from_header(bytes: &[u8; 16]) -> Self {
        let (mut scales, mut mins) = ([0; GROUPS], [0; GROUPS]);
        for g in 0..4 {
            let (s, m, low) = (bytes[4 + g], bytes[8 + g], bytes[12 + g]);
            scales[g] = s & 63;
            mins[g] = m & 63;
            scales[g + 4] = low & 15 | (s >> 6) << 4;
            mins[g + 4] = low >> 4 | (m >> 6) << 4;
        }
        Self {
            d: f16::from_le_bytes([bytes[0], bytes[1]]),
            dmin: f16::from_le_bytes([bytes[2], bytes[3]]),
            scales,
            mins,
        }
    }
}

/// Fits a super-block of weights, of magnitude up to `MAGNITUDE_MAX`, to levels `0..=top`. Returns
/// it and the levels.
pub fn fit(x: &[f32; 256], top: f32) -> (Affine, [u8; 256]) {
    let x: &[[f32; GROUP]; GROUPS] = bytemuck::cast_ref(x);
    let w = x.each_ref().map(importance);
    let ideal: [(f32, f32); GROUPS] = std::array::from_fn(|g| fit_affine(&x[g], &w[g], top));
    let scale_max = ideal.iter().fold(0.0, |max: f32, fit| max.max(fit.0));
    let min_max = ideal.iter().fold(0.0, |max: f32, fit| max.max(-fit.1));
    let mut d = scale_f16(scale_max / SIX);
    let mut dmin = scale_f16(min_max / SIX);
    let mut best: Option<(f32, Affine)> = None;
    for _ in 0..ROUNDS {
        let block = choose_scales(x, &w, &ideal, d, dmin, top);
        let error = total_error(x, &w, &block, top);
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, block.clone()));
        }
        let Some((new_d, new_dmin)) = refit(x, &w, &block, top) else { break };
        let refitted = Affine { d: new_d, dmin: new_dmin, ..block };
        let error = total_error(x, &w, &refitted, top);
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, refitted));
        }
        (d, dmin) = (new_d, new_dmin);
    }
    // One round always runs. The fallback is a block of zeros.
    let zero = Affine { d: f16::ZERO, dmin: f16::ZERO, scales: [0; GROUPS], mins: [0; GROUPS] };
    let block = best.map_or(zero, |(_, block)| block);
    let mut levels = [0; 256];
    for (g, out) in levels.chunks_exact_mut(GROUP).enumerate() {
        let nearest = nearest(&x[g], block.groups()[g], top);
        for (out, level) in out.iter_mut().zip(nearest) {
            *out = level as u8; // 0..=31
        }
    }
    (block, levels)
}

/// The nearest levels for `w = a * level - b`.
fn nearest(x: &[f32; GROUP], (a, b): (f32, f32), top: f32) -> [f32; GROUP] {
    if a > 0.0 { affine_levels(x, -b, a.recip(), top) } else { [0.0; GROUP] }
}

fn group_error(x: &[f32; GROUP], w: &[f32; GROUP], ab: (f32, f32), top: f32) -> f32 {
    affine_error(x, w, &nearest(x, ab, top), ab.0, -ab.1)
}

fn total_error(
    x: &[[f32; GROUP]; GROUPS],
    w: &[[f32; GROUP]; GROUPS],
    block: &Affine,
    top: f32,
) -> f32 {
    let groups = block.groups();
    (0..GROUPS).map(|g| group_error(&x[g], &w[g], groups[g], top)).sum()
}

/// Chooses for each group the 6-bit scale and min near the ideal ones that have the least error.
fn choose_scales(
    x: &[[f32; GROUP]; GROUPS],
    w: &[[f32; GROUP]; GROUPS],
    ideal: &[(f32, f32); GROUPS],
    d: f16,
    dmin: f16,
    top: f32,
) -> Affine {
    let (df, dminf) = (d.to_f32(), dmin.to_f32());
    let mut block = Affine { d, dmin, scales: [0; GROUPS], mins: [0; GROUPS] };
    for g in 0..GROUPS {
        let mut least = f32::INFINITY;
        for scale in around(ideal[g].0, df) {
            for min in around(-ideal[g].1, dminf) {
                let error = group_error(&x[g], &w[g], (df * scale, dminf * min), top);
                if error < least {
                    least = error;
                    (block.scales[g], block.mins[g]) = (scale as u8, min as u8); // 0..=63
                }
            }
        }
    }
    block
}

/// The 6-bit integer nearest to `value / unit` and its two neighbours.
fn around(value: f32, unit: f32) -> impl Iterator<Item = f32> {
    let middle = if unit > 0.0 { (value / unit).round().clamp(0.0, SIX) } else { 0.0 };
    let wide = if unit > 0.0 { 1.0 } else { 0.0 };
    [0.0, -wide, wide]
        .into_iter()
        .map(move |step| middle + step)
        .filter(|n| (0.0..=SIX).contains(n))
}

/// The d and dmin that fit the block's scales, mins and levels best, as f16:
/// minimises `sum w (d * u - dmin * m - x)^2` with `u = scale * level`.
fn refit(
    x: &[[f32; GROUP]; GROUPS],
    w: &[[f32; GROUP]; GROUPS],
    block: &Affine,
    top: f32,
) -> Option<(f16, f16)> {
    let groups = block.groups();
    let (mut uu, mut um, mut mm, mut xu, mut xm) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    for g in 0..GROUPS {
        let levels = nearest(&x[g], groups[g], top);
        let (scale, m) = (f32::from(block.scales[g]), f32::from(block.mins[g]));
        let (mut guu, mut gu, mut gw, mut gxu, mut gx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for i in 0..GROUP {
            let (w, u) = (w[g][i], scale * levels[i]);
            guu += w * u * u;
            gu += w * u;
            gw += w;
            gxu += w * x[g][i] * u;
            gx += w * x[g][i];
        }
        uu += f64::from(guu);
        um += f64::from(gu * m);
        mm += f64::from(gw * m * m);
        xu += f64::from(gxu);
        xm += f64::from(gx * m);
    }
    let det = uu * mm - um * um;
    let (d, dmin) = if det > uu * mm * 1e-9 {
        ((xu * mm - xm * um) / det, (xu * um - xm * uu) / det)
    } else if uu > 0.0 {
        (xu / uu, 0.0)
    } else {
        return None;
    };
    let fits = |value: f64| (0.0..60_000.0).contains(&value);
    (fits(d) && fits(dmin)).then(|| (f16::from_f64(d), f16::from_f64(dmin)))
}

/// The values of `d` and `dmin` with which random bits give weights of this standard deviation,
/// with levels `0..count`: `s * q - m * mean(q)`, where `s` and `m` are uniform in `0..64`.
pub fn random(std: f32, count: f32) -> Vec<f32> {
    let (mean, square) = (31.5_f32, 31.5_f32.powi(2) + spread(64.0).powi(2));
    let q_mean = (count - 1.0) / 2.0;
    let q_square = q_mean.powi(2) + spread(count).powi(2);
    let variance = square * q_square - (mean * q_mean).powi(2) + (q_mean * spread(64.0)).powi(2);
    let d = std / variance.sqrt();
    vec![d, d * q_mean]
}

/// The first bytes of a Q4_K or Q5_K block: `d`, `dmin`, scales and mins.
#[inline(always)]
pub fn header<const N: usize>(block: &[u8; N]) -> &[u8; 16] {
    block.first_chunk().expect("in block")
}

/// Q4_K, and Q5_K with its 32 bytes of fifth bits: `w = d * scale * q - dmin * min`.
///
/// Shifts are constants (a vector of bytes has no variable shift), so the fifth bits move down by
/// two from pair to pair. Q4_K uses the same loops with fifth bits of zero. Without them the
/// compiler unrolls before it vectorises, and the product takes three times as long (4.3 against
/// 1.5 G weights/s on one core).
#[inline(always)]
pub fn unpack<const FIFTH: bool, const BYTES: usize>(block: &[u8; BYTES], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (nibbles, _) = block[if FIFTH { 48 } else { 16 }..].as_chunks::<32>();
    let mut fifth = [0; 32];
    if FIFTH {
        fifth.copy_from_slice(&block[16..48]);
    }
    for (pair, (quants, out)) in nibbles.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let ((a, b), (c, e)) = (scale_min(block, 2 * pair), scale_min(block, 2 * pair + 1));
        let (a, b, c, e) = (d * a, dmin * b, d * c, dmin * e);
        for i in 0..32 {
            let q = quants[i] & 15 | (fifth[i] & 1) << 4;
            low[i] = a * f32::from(q) - b;
        }
        for i in 0..32 {
            let q = quants[i] >> 4 | (fifth[i] & 2) << 3;
            high[i] = c * f32::from(q) - e;
        }
        if FIFTH {
            fifth.iter_mut().for_each(|bits| *bits >>= 2);
        }
    }
}

/// Scale and min of group `g`, from twelve bytes of six-bit numbers. Those of the last four groups
/// are split.
#[inline(always)]
fn scale_min(block: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = if g < 4 {
        (block[4 + g] & 63, block[8 + g] & 63)
    } else {
        let (s, m, low) = (block[g], block[4 + g], block[8 + g]);
        (low & 15 | s >> 6 << 4, low >> 4 | m >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Eight six-bit scales and eight mins from twelve bytes, times `d` and `dmin`.
#[inline(always)]
pub fn scales_mins<L: Lanes>(l: L, block: &[u8]) -> ([f32; 8], L::V) {
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
