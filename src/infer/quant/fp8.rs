//! FP8: 128 weights in 132 bytes: f32 `d`, then a byte for each weight; `w = d * number`, where a byte
//! is a number of one bit of sign, four of exponent and three of fraction (e4m3, the form without
//! infinities).
//!
//! The block is ours: checkpoints keep scales apart, one for each row or for each 128 rows and columns.
//! All of these are repeated exactly, for 3 % of the size. Kernels multiply such weights with plain
//! activations, because no integer holds them. Source of the numbers: OCP Microscaling Formats v1.0.

use super::planes::{Plane, copy};
use super::{Format, Layout, MAGNITUDE_MAX, Scales};

/// The largest number.
const LARGEST: f32 = 448.0;
/// Blocks of smaller weights are zeros.
const TINY: f32 = 1e-30;

/// What each byte stands for.
const VALUES: [f32; 256] = values();

pub struct Fp8;

impl Format<128, 132> for Fp8 {
    const LAYOUT: Layout = Layout {
        group: 128,
        levels: 0..256,
        values: &VALUES,
        quants: 4..132,
        scales: Scales::Float(0),
        max: MAGNITUDE_MAX,
        error: 0.03,
        narrow: Some(doppler_store::DType::Q8_0),
    };

    fn read(block: &[u8; 132], out: &mut [f32; 128]) {
        let d = scale(block);
        for (out, byte) in out.iter_mut().zip(&block[4..]) {
            *out = d * VALUES[usize::from(*byte)];
        }
    }

    /// The largest weight becomes +-448.
    fn write(weights: &[f32; 128]) -> [u8; 132] {
        let mut out = [0; 132];
        let peak = weights.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        if peak < TINY {
            return out;
        }
        let d = peak / LARGEST;
        out[..4].copy_from_slice(&d.to_le_bytes());
        for (out, x) in out[4..].iter_mut().zip(weights) {
            *out = nearest(x / d);
        }
        out
    }

    fn planes() -> Vec<Plane> {
        vec![copy(4, 128), copy(0, 4)]
    }

    /// By the mean square of the numbers, with the largest in place of NaN.
    fn random(std: f32) -> Vec<f32> {
        let number = |value: &f32| if value.is_nan() { LARGEST } else { *value };
        let squares: f32 = VALUES.iter().map(|value| number(value).powi(2)).sum();
        vec![std / (squares / 256.0).sqrt()]
    }

    #[inline(always)]
    fn unpack(block: &[u8; 132], out: &mut [f32; 128]) {
        let d = scale(block);
        let bytes: &[u8; 128] = block.last_chunk().expect("in block");
        for i in 0..128 {
            out[i] = d * e4m3(bytes[i]);
        }
    }
}

#[inline(always)]
const fn scale(block: &[u8; 132]) -> f32 {
    f32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

/// A number without a table, so that the compiler vectorises it.
#[inline(always)]
const fn e4m3(byte: u8) -> f32 {
    let (magnitude, sign) = ((byte & 0x7f) as u32, ((byte & 0x80) as u32) << 24);
    let normal = (magnitude << 20) + (120 << 23);
    let small = (magnitude as f32 * 0.001_953_125).to_bits();
    let bits = if magnitude < 8 { small } else { normal };
    f32::from_bits(sign | if magnitude == 0x7f { 0x7fc0_0000 } else { bits })
}

const fn values() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        values[byte] = e4m3(byte as u8);
        byte += 1;
    }
    values
}

/// The byte of the nearest number; of two the one whose fraction is even.
fn nearest(x: f32) -> u8 {
    let a = x.abs().min(LARGEST);
    let magnitude = if a < 0.015_625 {
        // Multiples of 2^-9, of which the eighth is the smallest normal number.
        (a * 512.0).round_ties_even() as u8
    } else {
        let bits = a.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    if x < 0.0 { magnitude | 0x80 } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_standard_and_each_is_its_own_nearest() {
        assert_eq!((VALUES[0x7e], VALUES[0x08], VALUES[0x01]), (448.0, 0.015_625, 0.001_953_125));
        assert_eq!((VALUES[0x38], VALUES[0xb8]), (1.0, -1.0));
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        for (byte, value) in VALUES.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
            let byte = if byte == 0x80 { 0 } else { byte as u8 };
            assert_eq!(nearest(*value), byte, "{value}");
        }
        // Halfway, the even fraction; past the largest, the largest.
        assert_eq!([1.0625, 1.1875, 460.0, 0.000_976].map(nearest), [0x38, 0x3a, 0x7e, 0]);
    }
}
