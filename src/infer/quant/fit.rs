//! Scales for a small group of weights: the step and the offset with the least error.
//!
//! For given levels, the best scale (and offset) is a weighted linear least squares problem with a
//! closed solution. For a given scale, the best levels are the nearest ones. So: start from several
//! steps around the one that spans the group, solve, and from the best one alternate between levels
//! and solution until the error no longer falls. Larger weights count more (`importance`), because
//! the model sees their products.

use half::f16;

/// Rounds to the nearest integer, |x| < 2^22 (adding 1.5 * 2^23 leaves no
/// fraction bits). Unlike `f32::round` it compiles to two vector additions.
#[inline]
pub fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

/// `term(0) + ... + term(N - 1)`, `N` a multiple of 8, in eight running sums: a single sum could
/// not be vectorized, because float addition may not be reordered.
#[inline]
pub fn sum<const N: usize>(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; 8];
    for start in (0..N).step_by(8) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    lanes.iter().sum()
}

/// A scale as f16. It is the nearest f16, except that among subnormals, which are coarse, it is
/// never nearer to zero than the scale, so that no level leaves its range.
pub fn scale_f16(scale: f32) -> f16 {
    let nearest = f16::from_f32(scale);
    if nearest.to_f32().abs() < scale.abs() && nearest.to_f32().abs() < f16::MIN_POSITIVE.to_f32() {
        return f16::from_bits(nearest.to_bits() + 1); // sign and magnitude: one step further from zero
    }
    nearest
}

/// Ranges below this are treated as zero: their inverse would overflow.
const TINY: f32 = 1e-30;

/// How often levels and solution alternate, at most.
const ROUNDS_MAX: usize = 4;

/// The cost of an error in each weight: its magnitude plus the group's root mean square.
pub fn importance<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let rms = (sum::<N>(|i| x[i] * x[i]) / N as f32).sqrt();
    x.map(|x| rms + x.abs())
}

/// The levels `0..=top` nearest to `(x - offset) * inverse`. (`max` and `min`
/// vectorize where `clamp`, which checks its bounds, does not.)
#[inline]
pub fn affine_levels<const N: usize>(
    x: &[f32; N],
    offset: f32,
    inverse: f32,
    top: f32,
) -> [f32; N] {
    x.map(|x| round(((x - offset) * inverse).max(0.0).min(top)))
}

/// `sum w (scale * l + offset - x)^2`
#[inline]
pub fn affine_error<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    l: &[f32; N],
    scale: f32,
    offset: f32,
) -> f32 {
    sum::<N>(|i| {
        let e = scale * l[i] + offset - x[i];
        w[i] * e * e
    })
}

/// Weights as `scale * level + offset`, levels `0..=top`, `scale >= 0`, `offset <= 0`.
pub fn fit_affine<const N: usize>(x: &[f32; N], w: &[f32; N], top: f32) -> (f32, f32) {
    let low = x.iter().copied().fold(0.0, f32::min);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let range = high - low;
    if range < TINY {
        return (0.0, low);
    }
    let mut best = (f32::INFINITY, range / top, low);
    // From a step that leaves the top level unused to a step that clips the tails.
    for step in -5..=10 {
        let l = affine_levels(x, low, (top + 0.2 * step as f32) / range, top);
        let (scale, offset) = solve_affine(x, w, &l);
        let error = affine_error(x, w, &l, scale, offset);
        if error < best.0 {
            best = (error, scale, offset);
        }
    }
    for _ in 0..ROUNDS_MAX {
        if best.1 < TINY {
            break;
        }
        let l = affine_levels(x, best.2, best.1.recip(), top);
        let (scale, offset) = solve_affine(x, w, &l);
        let error = affine_error(x, w, &l, scale, offset);
        if error >= best.0 {
            break;
        }
        best = (error, scale, offset);
    }
    (best.1, best.2)
}

/// The scale and offset (at most 0) that fit these levels best.
fn solve_affine<const N: usize>(x: &[f32; N], w: &[f32; N], l: &[f32; N]) -> (f32, f32) {
    let sw = sum::<N>(|i| w[i]);
    let sl = sum::<N>(|i| w[i] * l[i]);
    let sll = sum::<N>(|i| w[i] * l[i] * l[i]);
    let sx = sum::<N>(|i| w[i] * x[i]);
    let sxl = sum::<N>(|i| w[i] * x[i] * l[i]);
    let det = sw * sll - sl * sl;
    if det > 0.0 {
        let (scale, offset) = ((sw * sxl - sx * sl) / det, (sll * sx - sl * sxl) / det);
        if offset <= 0.0 && scale >= 0.0 {
            return (scale, offset);
        }
    }
    if sll > 0.0 { ((sxl / sll).max(0.0), 0.0) } else { (0.0, (sx / sw).min(0.0)) }
}

/// The levels `-half..half` nearest to `x * inverse`.
#[inline]
pub fn symmetric_levels<const N: usize>(x: &[f32; N], inverse: f32, half: f32) -> [f32; N] {
    x.map(|x| round((x * inverse).max(-half).min(half - 1.0)))
}

/// Weights as `scale * level`, levels `-half..half`; the scale may be negative,
/// so that the largest weight can use the one level that has no opposite.
pub fn fit_symmetric<const N: usize>(x: &[f32; N], w: &[f32; N], half: f32) -> f32 {
    let peak = x.iter().copied().fold(0.0_f32, |a, b| if b.abs() > a.abs() { b } else { a });
    if peak.abs() < TINY {
        return 0.0;
    }
    // sum w (x - s l)^2 is least at s = sxl / sll, where it is sxx - sxl^2 / sll.
    let gain = |inverse: f32| {
        let l = symmetric_levels(x, inverse, half);
        let sxl = sum::<N>(|i| w[i] * x[i] * l[i]);
        let sll = sum::<N>(|i| w[i] * l[i] * l[i]);
        if sll > 0.0 { (sxl * sxl / sll, sxl / sll) } else { (0.0, 0.0) }
    };
    let mut best = (0.0, 0.0);
    for step in -10..=10 {
        let found = gain(-(half + 0.1 * step as f32) / peak);
        if found.0 > best.0 {
            best = found;
        }
    }
    for _ in 0..ROUNDS_MAX {
        if best.1.abs() < TINY {
            break;
        }
        let found = gain(best.1.recip());
        if found.0 <= best.0 {
            break;
        }
        best = found;
    }
    best.1
}
