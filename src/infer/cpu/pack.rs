//! One token's activations as the decode kernels pass them on (kernels/shared/pack.wgsl), and their
//! products with rows of weights (kernels/shared/pieces.wgsl).
//!
//! A packed vector holds each number twice: as it is, for weights of a plain format, and rounded,
//! for quantised weights, which are multiplied with it in integers. Sixteen neighbours share a
//! scale: the largest magnitude divided by 32,512. A number is then `scale * (256 * high + low)`,
//! where both are signed bytes. If one of the sixteen is not finite, the scale is NaN, so that an
//! overflow does not look like a sound result.
//!
//! A piece is 32 elements: piece `2 g + h` is the sixteen from `64 g + 16 h` on and the sixteen
//! from `64 g + 32 + 16 h` on, as in repacked weights (src/infer/gpu/repack.rs). A vector of `p`
//! pieces is, in words:
//!
//! | words | what |
//! |---|---|
//! | 4 p, 4 p | high bytes, lowest element first: of the pieces' first sixteens, of their second |
//! | 4 p, 4 p | low bytes likewise |
//! | 4 p | of each piece: both scales, then both sums of rounded numbers, as f32 |
//! | 32 p | the elements as f32, in order; zeros past the last |

use super::matrix::Matrix;
use crate::quant::meets_plain;
use doppler_store::DType;

/// Elements that share a scale.
pub const SIXTEEN: usize = 16;

/// The value to which the largest of sixteen is scaled: 127 * 256.
pub const WHOLE_MAX: f32 = 32512.0;

/// Below this, sixteen elements count as zero: the reciprocal of their scale may not be finite.
const TINY: f32 = 1e-32;

const NOT_A_NUMBER: u32 = 0x7fc0_0000;

/// Pieces of a vector of this many elements: two for each 64.
pub const fn pieces(cols: usize) -> usize {
    cols.div_ceil(64) * 2
}

/// Words of a packed vector of this many elements.
pub const fn packed_words(cols: usize) -> usize {
    pieces(cols) * 52
}

/// The piece of the sixteen elements number `sixteen`, and whether they are its first or second
/// half.
const fn place(sixteen: usize) -> (usize, usize) {
    (sixteen / 4 * 2 + sixteen % 2, sixteen / 2 % 2)
}

/// Packs `values` into all of `packed`, with zeros past the last.
pub fn pack(values: &[f32], packed: &mut [u32]) {
    let pieces = packed.len() / 52;
    packed.fill(0);
    for (t, values) in values.chunks(SIXTEEN).enumerate() {
        let (piece, second) = place(t);
        let most = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let (scale, inverse) =
            if most < TINY { (0.0, 0.0) } else { (most / WHOLE_MAX, WHOLE_MAX / most) };
        let odd = values.iter().any(|value| !value.is_finite());
        let mut sum = 0;
        for (i, value) in values.iter().enumerate() {
            let whole = (value * inverse).round_ties_even() as i32;
            sum += whole;
            let high = (whole + 128) >> 8;
            let at = (second * pieces + piece) * 4 + i / 4;
            let byte = |value: i32| u32::from(value as u8) << (8 * (i % 4));
            packed[at] |= byte(high);
            packed[at + 8 * pieces] |= byte(whole - (high << 8));
            packed[20 * pieces + t * SIXTEEN + i] = value.to_bits();
        }
        let at = (4 * pieces + piece) * 4 + second;
        let bits = |value: f32| if odd { NOT_A_NUMBER } else { value.to_bits() };
        packed[at] = bits(scale);
        packed[at + 2] = bits(scale * sum as f32);
    }
}

/// A packed vector.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    words: &'a [u32],
    pieces: usize,
}

impl<'a> Packed<'a> {
    /// `words` has the length given by [`packed_words`].
    pub const fn new(words: &'a [u32]) -> Self {
        Self { words, pieces: words.len() / 52 }
    }

    /// Element `i` as it is.
    pub fn plain(&self, i: usize) -> f32 {
        f32::from_bits(self.words[20 * self.pieces + i])
    }

    /// Element `i` as an integer, in units of its scale.
    pub fn whole(&self, i: usize) -> i32 {
        let (piece, second) = place(i / SIXTEEN);
        let at = (second * self.pieces + piece) * 4 + i % SIXTEEN / 4;
        let byte = |at: usize| i32::from((self.words[at] >> (8 * (i % 4))) as u8 as i8);
        256 * byte(at) + byte(at + 8 * self.pieces)
    }

    /// The scale of sixteen elements.
    pub fn scale(&self, sixteen: usize) -> f32 {
        let (piece, second) = place(sixteen);
        f32::from_bits(self.words[(4 * self.pieces + piece) * 4 + second])
    }

    /// The sum of sixteen rounded elements.
    pub fn sum(&self, sixteen: usize) -> f32 {
        let (piece, second) = place(sixteen);
        f32::from_bits(self.words[(4 * self.pieces + piece) * 4 + second + 2])
    }

    /// The elements with which weights of a format are multiplied, plain or rounded.
    pub fn meeting(&self, dtype: DType) -> Vec<f64> {
        let rounded = |i| f64::from(self.scale(i / SIXTEEN)) * f64::from(self.whole(i));
        let plain = |i| f64::from(self.plain(i));
        let all = 0..32 * self.pieces;
        if meets_plain(dtype) { all.map(plain).collect() } else { all.map(rounded).collect() }
    }
}

/// Each row of `weight` times a packed vector. Exact, except that weights are taken as f32.
pub fn products(x: Packed<'_>, weight: Matrix<'_>) -> Vec<f64> {
    let x = x.meeting(weight.dtype);
    let mut row = vec![0.0; weight.cols];
    let product = |at| {
        weight.unpack_row(at, &mut row);
        row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum()
    };
    (0..weight.rows).map(product).collect()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn what_is_packed_is_found_again_within_half_a_step() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for cols in [1, 16, 17, 63, 64, 65, 300] {
            let mut values: Vec<f32> = (0..cols).map(|_| rng.random_range(-1.0..1.0)).collect();
            // Groups of sixteen of every scale, one of them all zeros.
            for (t, sixteen) in values.chunks_mut(SIXTEEN).enumerate() {
                sixteen.iter_mut().for_each(|v| *v *= [1.0, 1e-20, 0.0, 1e20][t % 4]);
            }
            let mut words = vec![9; packed_words(cols)];
            pack(&values, &mut words);
            let packed = Packed::new(&words);
            for t in 0..pieces(cols) * 2 {
                let of = values.get(t * SIXTEEN..).unwrap_or_default();
                let of = &of[..of.len().min(SIXTEEN)];
                let most = of.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let step = f64::from(packed.scale(t));
                let mut sum = 0.0;
                for i in 0..SIXTEEN {
                    let value = of.get(i).copied().unwrap_or(0.0);
                    assert_eq!(packed.plain(t * SIXTEEN + i), value, "{cols}: element {i} of {t}");
                    let rounded = step * f64::from(packed.whole(t * SIXTEEN + i));
                    sum += rounded;
                    assert!(
                        (rounded - f64::from(value)).abs() <= 0.51 * step,
                        "{cols}: {i} of {t}"
                    );
                }
                assert!((step * 32512.0 - f64::from(most)).abs() <= f64::from(most) * 1e-6);
                assert!((sum - f64::from(packed.sum(t))).abs() <= step * 0.1, "{cols}: sum {t}");
            }
        }
    }

    #[test]
    fn a_sixteen_that_is_not_finite_has_no_scale_and_others_keep_theirs() {
        let plain: Vec<f32> = (0..64).map(|i| i as f32 - 20.0).collect();
        let mut want = vec![0; packed_words(64)];
        pack(&plain, &mut want);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = plain.clone();
            values[37] = odd;
            let mut words = vec![0; packed_words(64)];
            pack(&values, &mut words);
            let (got, want) = (Packed::new(&words), Packed::new(&want));
            assert!(got.scale(2).is_nan() && got.sum(2).is_nan());
            for t in [0, 1, 3] {
                assert_eq!((got.scale(t), got.sum(t)), (want.scale(t), want.sum(t)));
            }
        }
    }
}
