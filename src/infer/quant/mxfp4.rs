//! MXFP4: 32 weights in 17 bytes: an exponent `e`, 16 bytes whose low nibbles are weights 0..16 and
//! high nibbles 16..32; `w = 2^(e - 127) * number`, where a nibble is a number of one bit of sign,
//! two of exponent and one of fraction (e2m1).
//!
//! The block is ggml's (`block_mxfp4`), the numbers those of OCP Microscaling Formats v1.0. As in
//! ggml a zero has no sign, and 255 as an exponent makes all weights of a block NaN.

use super::fit::importance;
use super::planes::{Plane, copy_pair, nibbles_pair};
use super::{Format, Layout, MAGNITUDE_MAX, Scales};
use crate::cpu::lanes::Lanes;
use crate::cpu::row_dot::{eights, products};

/// Twice what each nibble stands for, which is whole.
const DOUBLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Halfway from each magnitude to the next.
const BETWEEN: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// Blocks of smaller weights are zeros.
const TINY: f32 = 1e-30;

pub struct Mxfp4;

impl Format<32, 17> for Mxfp4 {
    const LAYOUT: Layout = Layout {
        group: 32,
        levels: 0..16,
        values: &[
            0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
        ],
        quants: 1..17,
        scales: Scales::Exponent(0),
        max: MAGNITUDE_MAX,
        error: 0.12,
        narrow: None,
    };

    fn read(block: &[u8; 17], out: &mut [f32; 32]) {
        let half = half_scale(block[0]);
        for (i, out) in out.iter_mut().enumerate() {
            let nibble = block[1 + i % 16] >> (4 * (i / 16)) & 15;
            *out = half * f32::from(DOUBLE[usize::from(nibble)]);
        }
    }

    /// Of the exponent that the standard says (the largest weight's) and its neighbours, the one
    /// with the least error.
    fn write(weights: &[f32; 32]) -> [u8; 17] {
        let mut out = [0; 17];
        let peak = weights.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        if peak < TINY {
            return out;
        }
        let w = importance(weights);
        // The largest number is 1.5 * 2^2.
        let usual = (peak.to_bits() >> 23) as u8 - 2;
        let mut best = f32::INFINITY;
        for exponent in [usual, usual - 1, usual + 1] {
            let scale = half_scale(exponent) * 2.0;
            let levels = weights.map(|x| level(x / scale));
            let mut error = 0.0;
            for ((x, w), level) in weights.iter().zip(&w).zip(levels) {
                error += w * (scale / 2.0 * f32::from(DOUBLE[usize::from(level)]) - x).powi(2);
            }
            if error < best {
                best = error;
                out[0] = exponent;
                for i in 0..16 {
                    out[1 + i] = levels[i] | levels[16 + i] << 4;
                }
            }
        }
        out
    }

    fn planes() -> Vec<Plane> {
        vec![nibbles_pair(17, 1), copy_pair(17, 0, 1)]
    }

    /// The mean square of the sixteen numbers is 8.5625.
    fn random(std: f32) -> Vec<f32> {
        vec![std / 8.5625_f32.sqrt()]
    }

    #[inline(always)]
    fn unpack(block: &[u8; 17], out: &mut [f32; 32]) {
        let (half, levels) = (half_scale(block[0]), doubles(block));
        for i in 0..32 {
            out[i] = half * f32::from(levels[i]);
        }
    }

    #[inline(always)]
    fn unpack_lanes<L: Lanes>(l: L, block: &[u8; 17], out: &mut [f32; 32]) {
        let (half, levels) = (l.splat(half_scale(block[0])), doubles(block));
        let (out, _) = out.as_chunks_mut::<8>();
        for (i, levels) in eights(&levels).iter().enumerate() {
            out[i] = l.store(l.mul(half, l.signed(levels)));
        }
    }

    #[inline(always)]
    fn dot<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
        let mut acc = [l.splat(0.0); 2];
        let blocks = row.as_chunks::<17>().0.iter().zip(x.as_chunks::<32>().0);
        for (i, (block, x)) in blocks.enumerate() {
            let half = l.splat(half_scale(block[0]));
            acc[i % 2] = l.fma(half, products(l, &doubles(block), x), acc[i % 2]);
        }
        l.sum(l.add(acc[0], acc[1]))
    }
}

/// Half of `2^(e - 127)`, which [`DOUBLE`] is multiplied with.
#[inline(always)]
fn half_scale(exponent: u8) -> f32 {
    match exponent {
        // Subnormal.
        0 => f32::from_bits(1 << 21),
        1 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent - 1) << 23),
    }
}

/// [`DOUBLE`] of each weight, without a table, so that the compiler vectorises it.
#[inline(always)]
fn doubles(block: &[u8; 17]) -> [i8; 32] {
    let nibbles: &[u8; 16] = block.last_chunk().expect("in block");
    let mut out = [0_i8; 32];
    for i in 0..16 {
        out[i] = double(nibbles[i] & 15);
        out[16 + i] = double(nibbles[i] >> 4);
    }
    out
}

/// A magnitude of 4 and more is itself, its low two bits once more, and 2 for the largest.
#[inline(always)]
fn double(nibble: u8) -> i8 {
    let low = nibble & 7;
    let more = (low >> 2).wrapping_neg() & nibble & 3;
    let magnitude = low + more + ((more & more >> 1 & 1) << 1);
    let negative = (nibble >> 3).wrapping_neg();
    (magnitude ^ negative).wrapping_sub(negative).cast_signed()
}

/// The nearest number's nibble; of two the one whose fraction is 0.
fn level(x: f32) -> u8 {
    let a = x.abs();
    let mut level = 0;
    for (below, between) in BETWEEN.iter().enumerate() {
        level += u8::from(a > *between || a == *between && below % 2 == 1);
    }
    if x < 0.0 && level > 0 { level | 8 } else { level }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_gives_what_the_table_says() {
        for (nibble, double_of) in DOUBLE.into_iter().enumerate() {
            assert_eq!(double(nibble as u8), double_of);
            assert_eq!(f32::from(double_of), 2.0 * Mxfp4::LAYOUT.values[nibble]);
        }
    }

    #[test]
    fn a_block_has_ggmls_layout() {
        let mut block = [0; 17];
        (block[0], block[3], block[6]) = (130, 0x0f, 0x52);
        let mut out = [0.0; 32];
        Mxfp4::read(&block, &mut out);
        // Byte 3 holds weights 2 and 18, byte 6 weights 5 and 21; the scale is 8.
        assert_eq!((out[2], out[18], out[5], out[21]), (-48.0, 0.0, 8.0, 24.0));
        for (exponent, smallest) in
            [(0, 2_f32.powi(-128)), (1, 2_f32.powi(-127)), (2, 2_f32.powi(-126))]
        {
            (block[0], block[1]) = (exponent, 1);
            Mxfp4::read(&block, &mut out);
            assert_eq!(out[0], smallest);
        }
        block[0] = 255;
        Mxfp4::read(&block, &mut out);
        assert!(out.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn halfway_between_two_numbers_the_fraction_is_zero() {
        let near = |x| Mxfp4::LAYOUT.values[usize::from(level(x))];
        for (x, want) in [
            (0.25, 0.0),
            (0.26, 0.5),
            (0.75, 1.0),
            (-1.25, -1.0),
            (1.75, 2.0),
            (2.5, 2.0),
            (-3.5, -4.0),
            (5.0, 4.0),
            (5.1, 6.0),
            (9.0, 6.0),
            (-0.1, 0.0),
        ] {
            assert_eq!(near(x), want, "{x}");
        }
    }
}
