//! A row of activations in half precision, scaled by a power of two so that its largest
//! magnitude lies in 2^14 .. 2^15.

use half::f16;

/// Returns `row` in half precision, and the power of two that restores its scale, which is within
/// 2^-126 .. 2^112.
pub fn halve(row: &[f32]) -> (Vec<f16>, f32) {
    let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let exponent = (largest.to_bits() >> 23).clamp(15, 254);
    let scale = f32::from_bits((268 - exponent) << 23);
    let halves = row.iter().map(|x| f16::from_f32(x * scale)).collect();
    (halves, f32::from_bits((exponent - 14) << 23))
}
