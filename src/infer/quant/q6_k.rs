//! Q6_K: 256 weights in 210 bytes: 128 bytes of low nibbles, 64 of high bit
//! pairs, 16 signed 8-bit scales (one a group of 16), f16 `d` last;
//! `w = d * scale * (level - 32)`, levels `0..64` (ggml's `block_q6_K`).

use half::f16;

use super::fit::{fit_symmetric, importance, scale_f16, sum, symmetric_levels};

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

pub fn read(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[D], block[D + 1]]).to_f32();
    for (i, out) in out.iter_mut().enumerate() {
        let (low, low_shift, high, high_shift) = place(i);
        let level = block[low] >> low_shift & 15 | (block[high] >> high_shift & 3) << 4;
        let scale = block[SCALES + i / GROUP].cast_signed();
        *out = d * f32::from(scale) * (f32::from(level) - 32.0);
    }
}

pub fn write(weights: &[f32; 256]) -> [u8; 210] {
    let x: &[[f32; GROUP]; GROUPS] = bytemuck::cast_ref(weights);
    let w = x.each_ref().map(importance);
    let ideal: [f32; GROUPS] = std::array::from_fn(|g| fit_symmetric(&x[g], &w[g], 32.0));
    // The scale of largest magnitude becomes -128, the end of the range that has no opposite.
    let peak = ideal.iter().copied().fold(0.0_f32, |a, b| if b.abs() > a.abs() { b } else { a });
    let d = scale_f16(peak / -128.0);
    let scales = choose_scales(x, &w, &ideal, d);
    let d = refit(x, &w, &scales, d);
    let scales = choose_scales(x, &w, &ideal, d);
    pack(x, &scales, d)
}

/// The signed levels nearest for one group.
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

/// For each group the 8-bit scale next to its ideal that loses least.
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
