//! The arithmetic of sampling: from a logit to its key, its rank and its weight.
//!
//! Probabilities are computed in integers only, so that the kernels (`kernels/shared/odds.wgsl`)
//! make exactly the same choice: WGSL allows f32 arithmetic to round either way, to flush
//! subnormals and to be fused. Three steps:
//! - a *key* orders logits as `u32`s;
//! - a *rank* is the distance below the highest logit, in 1/65536 octaves of probability;
//!   tokens of one rank count as equally likely, the lower id first;
//! - a *weight* is `2^31 * 2^(-rank / 65536)`, the relative probability.

use pulp::Arch;

use super::sampler::SamplerOptions;

/// Tokens that one workgroup handles.
pub const CHUNK: usize = 1024;
/// The largest vocabulary that a device samples: 256 chunks.
pub const VOCAB_MAX: usize = 256 * CHUNK;
/// The longest window of recent tokens that a device keeps.
pub const WINDOW_MAX: usize = 256;

/// The key of -inf and NaN. They are never chosen while any other logit is there.
pub const FLOOR: u32 = 0x007f_ffff;
/// The key of +inf.
const INFINITE: u32 = 0xff80_0000;

/// What a device reports instead of a token if a logit is infinite or NaN.
pub const REFUSED: u32 = u32::MAX;

/// All ranks are below it: 32 octaves. Tokens further down have no weight.
pub const RANK_END: u32 = 1 << 21;
/// The rank of a token without weight.
pub const NEVER: u32 = u32::MAX;
/// Ranks are counted in coarse bins of 1/64 octave, then by the rank itself within one bin.
pub const FINE_BITS: u32 = 10;
pub const FINE: usize = 1 << FINE_BITS;
pub const COARSE: usize = (RANK_END >> FINE_BITS) as usize;

/// A logit's place in the order of all logits. Both zeros have the same key.
pub const fn key(logit: f32) -> u32 {
    let bits = logit.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        FLOOR
    } else if magnitude == 0 {
        0x8000_0000
    } else if bits == magnitude {
        bits | 0x8000_0000
    } else {
        !bits
    }
}

/// The logit of a key.
const fn logit(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 != 0 { key & 0x7fff_ffff } else { !key })
}

/// Sampling options as integers and plain factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// The highest key wins; nothing is drawn.
    pub greedy: bool,
    /// The factor for recent tokens' logits that are not positive.
    pub penalty: f32,
    /// Its reciprocal, for positive logits: WGSL's division is not exact.
    pub penalty_inverse: f32,
    /// How many recent tokens are penalised; 0 if there is no penalty.
    pub window: usize,
    /// Differences of logits are counted in units of `2^-unit`...
    unit: i32,
    /// ... of which one is `scale / 2^35` ranks; at least `2^31`, so a rank is 8 to 16 units.
    scale: u32,
    /// 0 means all.
    pub top_k: u32,
    /// In `2^-32`; 0 means all.
    pub top_p: u32,
    pub seed: u64,
}

impl Recipe {
    /// From options within their ranges.
    pub fn new(options: &SamplerOptions) -> Self {
        // Top-1 means the highest logit, even if others have the same rank.
        let greedy = options.temperature == 0.0 || options.top_k == 1;
        let octaves = match options.temperature == 0.0 {
            true => 1.0,
            false => std::f64::consts::LOG2_E / f64::from(options.temperature),
        };
        // log2, rounded down. An f32's reciprocal is never a subnormal f64.
        let exponent = (octaves.to_bits() >> 52) as i32 - 1023;
        let penalised = options.repetition_penalty != 1.0;
        Self {
            greedy,
            penalty: options.repetition_penalty,
            penalty_inverse: 1.0 / options.repetition_penalty,
            window: if penalised { options.repetition_window } else { 0 },
            unit: 20 + exponent,
            scale: (octaves * two_to(31 - exponent)) as u32,
            top_k: u32::try_from(options.top_k).unwrap_or(u32::MAX),
            top_p: match options.top_p < 1.0 {
                true => ((f64::from(options.top_p) * two_to(32)) as u32).max(1),
                false => 0,
            },
            seed: options.seed,
        }
    }

    /// A recent token's logit, made less likely.
    pub fn penalised(&self, logit: f32) -> f32 {
        logit * if logit > 0.0 { self.penalty_inverse } else { self.penalty }
    }

    /// `(unit, scale)`, for the kernels' parameters.
    pub const fn steepness(&self) -> (i32, u32) {
        (self.unit, self.scale)
    }
}

/// `2^exponent` of a normal f64.
const fn two_to(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// Measures how far keys lie below the highest.
#[derive(Debug, Clone, Copy)]
pub struct Ruler {
    max: u32,
    /// Logits are converted to fixed point, in units of `2^-unit`.
    unit: i32,
    factor: f64,
    /// The highest logit in fixed point.
    top: i64,
    /// From that unit to the recipe's.
    lift: u32,
    scale: u32,
}

impl Ruler {
    /// For the highest key.
    pub fn new(recipe: &Recipe, max: u32) -> Self {
        let exponent = ((logit(max).to_bits() >> 23 & 0xff) as i32).max(1) - 127;
        // The recipe's unit, or a coarser one that keeps the highest below 2^62.
        let unit = recipe.unit.min(61 - exponent);
        let factor = two_to(unit);
        Self {
            max,
            unit,
            factor,
            top: (f64::from(logit(max)) * factor) as i64,
            lift: (recipe.unit - unit) as u32,
            scale: recipe.scale,
        }
    }

    /// Replaces keys, none of which is above the highest, by their ranks.
    pub fn measure(&self, arch: Arch, keys: &mut [u32]) {
        let near = self.lift == 0 && self.top.unsigned_abs() < 1 << 30;
        if !near || self.unit.abs() > 100 || self.is_edge() {
            keys.iter_mut().for_each(|key| *key = self.rank(*key));
            return;
        }
        // The same in 32 bits: what saturates is 2^30 units or more below the highest.
        let (top, scale, factor) = (self.top as u32, self.scale, two_to(self.unit) as f32);
        arch.dispatch(
            #[inline(always)]
            || {
                for key in keys {
                    let below = top.wrapping_sub((logit(*key) * factor) as i32 as u32);
                    *key = rank_of(below, scale);
                }
            },
        );
    }

    /// Whether the highest logit is infinite or NaN.
    const fn is_edge(&self) -> bool {
        self.max == INFINITE || self.max == FLOOR
    }

    /// The rank of a key that is not above the highest.
    pub fn rank(&self, key: u32) -> u32 {
        if self.is_edge() {
            return if key == INFINITE { 0 } else { NEVER };
        }
        // Exact except for what is dropped below the unit; -inf saturates.
        let fixed = (f64::from(logit(key)) * self.factor) as i64;
        let below = self.top.wrapping_sub(fixed) as u64;
        let below = if below == 0 {
            0
        } else if self.lift < 32 && below <= u64::from(u32::MAX >> self.lift) {
            (below as u32) << self.lift
        } else {
            u32::MAX
        };
        rank_of(below, self.scale)
    }
}

/// The rank at this many units below the highest.
#[inline(always)]
const fn rank_of(below: u32, scale: u32) -> u32 {
    let rank = ((below as u64 * scale as u64) >> 35) as u32;
    if rank < RANK_END { rank } else { NEVER }
}

/// `2^31 * 2^(-rank / 65536)` within a relative 5e-7 while it is above `2^22`, decreasing with the
/// rank; 0 for [`NEVER`].
#[inline(always)]
pub const fn weight(rank: u32) -> u32 {
    // (1 - 2^-x) / x on 0..1 at its Chebyshev nodes, in 2^-32, signs alternating.
    const TERMS: [u32; 5] = [2_977_043_459, 1_031_714_237, 237_977_951, 40_133_167, 4_310_560];
    if rank >= RANK_END {
        return 0;
    }
    let x = (rank & 0xffff) as u64;
    let sum = TERMS[3] - times(TERMS[4], x);
    let sum = TERMS[2] - times(sum, x);
    let sum = TERMS[1] - times(sum, x);
    let sum = TERMS[0] - times(sum, x);
    (0x8000_0000 - (times(sum, x) >> 1)) >> (rank >> 16)
}

/// `a * x / 65536` of a 16-bit `x`.
#[inline(always)]
const fn times(a: u32, x: u64) -> u32 {
    ((a as u64 * x) >> 16) as u32
}

/// The least mass that `top_p` asks of a `total`: `top_p * total / 2^32`, rounded up.
pub fn enough(total: u64, top_p: u32) -> u64 {
    ((u128::from(total) * u128::from(top_p)).div_ceil(1 << 32)) as u64
}

/// SplitMix64 (Steele, Lea and Flood, 2014). Draw `n`, counted from 0, is a hash of `seed + (n + 1)
/// * step`.
pub const fn random(seed: u64, draw: u64) -> u64 {
    let mut z = seed.wrapping_add(draw.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Maps a random number of 64 bits to one below `total`.
pub fn below(random: u64, total: u64) -> u64 {
    ((u128::from(random) * u128::from(total)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(temperature: f32) -> Recipe {
        Recipe::new(&SamplerOptions { temperature, ..SamplerOptions::default() })
    }

    fn rank(temperature: f32, max: f32, logit: f32) -> u32 {
        let ruler = Ruler::new(&recipe(temperature), key(max));
        let one = ruler.rank(key(logit));
        let mut many = [key(logit); 9];
        ruler.measure(Arch::new(), &mut many);
        assert_eq!(many, [one; 9], "both ways, {logit} below {max} at {temperature}");
        one
    }

    #[test]
    fn keys_order_logits_and_tell_zeros_and_what_is_no_number() {
        let rising =
            [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-40, 0.0, 1e-45, 1.0, f32::MAX, f32::INFINITY];
        assert!(rising.is_sorted_by(|a, b| key(*a) < key(*b)));
        assert!(rising.iter().all(|l| logit(key(*l)) == *l));
        assert_eq!(key(-0.0), key(0.0));
        assert_eq!([key(f32::NAN), key(-f32::NAN), key(f32::NEG_INFINITY)], [FLOOR; 3]);
        assert_eq!(key(f32::INFINITY), INFINITE);
    }

    #[test]
    fn ranks_measure_octaves_at_any_temperature_and_magnitude() {
        for (temperature, max, below) in [
            (1.0_f32, 12.5_f32, 3.25_f32),
            (0.7, -4.0, 8.5),
            (1e-10, 30.0, 4e-6),
            (1e-30, 2e-30, 7e-30),
            (1e30, 2e30, 9e30),
            (1.0, 3.0e8, 0.0),
            (1e-40, 1e-39, 2.5e-39),
            (3e38, 3e38, 3e38),
            (2.0, -0.0, 0.0),
        ] {
            let low = max - below;
            let apart = f64::from(max) - f64::from(low);
            let want = apart / f64::from(temperature) * std::f64::consts::LOG2_E * 65536.0;
            let got = rank(temperature, max, low);
            match want < f64::from(RANK_END) {
                true => assert!((f64::from(got) - want).abs() < 1.5, "{got}, not {want}"),
                false => assert_eq!(got, NEVER, "{want}"),
            }
        }
        for below in 0..4000 {
            for (max, step) in [(20.0, 0.013), (-7.5, 1.0), (1e3, 3.7), (-1e4, 1e20)] {
                rank(0.9, max, max - below as f32 * step);
            }
        }
        assert_eq!(rank(1.0, 1.0, f32::NAN), NEVER);
        assert_eq!(rank(1.0, 0.0, -22.0) >> 16, 31);
        assert_eq!(rank(1.0, 0.0, -22.3), NEVER);
        assert_eq!(rank(f32::MAX, f32::INFINITY, f32::MAX), NEVER, "nothing comes near +inf");
        assert_eq!(rank(f32::MAX, f32::INFINITY, f32::INFINITY), 0);
        assert_eq!(rank(f32::MAX, f32::MAX, f32::NEG_INFINITY), NEVER);
        assert_eq!(rank(1.0, f32::NEG_INFINITY, f32::NEG_INFINITY), NEVER);
        assert_eq!(rank(1e-45, 3e38, f32::MIN), NEVER);
        assert_eq!(rank(1e-45, 3e38, 3e38), 0);
    }

    #[test]
    fn weights_fall_with_the_rank_as_powers_of_two() {
        assert_eq!((weight(0), weight(65536), weight(NEVER)), (1 << 31, 1 << 30, 0));
        for rank in 1..RANK_END {
            let want = (31.0 - f64::from(rank) / 65536.0).exp2();
            let got = weight(rank);
            assert!(got <= weight(rank - 1), "{rank}");
            assert!((f64::from(got) - want).abs() <= 1.0 + want * 5e-7, "{rank}: {got}, {want}");
        }
    }

    #[test]
    fn nucleus_and_draw_stay_within_the_total() {
        let total = (1 << 49) - 3;
        assert_eq!(enough(total, 1 << 31), (1 << 48) - 1, "half of it, rounded up");
        assert_eq!((enough(1 << 31, 1), enough(1 << 32, 1), enough((1 << 32) + 1, 1)), (1, 1, 2));
        assert_eq!((below(u64::MAX, total), below(0, total)), (total - 1, 0));
        assert_eq!(below(1 << 63, 10), 5);
        // The first outputs of the reference implementation for seed 1234567.
        let reference = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973];
        assert_eq!([random(1_234_567, 0), random(1_234_567, 1)], reference);
    }
}
