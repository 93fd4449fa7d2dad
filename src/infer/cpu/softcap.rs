//! Soft caps: `cap * tanh(x / cap)`, close to `x` near 0 and never beyond the cap.

/// Caps every element.
pub fn softcap(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|x| *x = softcapped(*x, cap));
}

/// A value that is not finite stays as it is, so that an overflow does not look like a sound result.
#[inline]
pub fn softcapped(x: f32, cap: f32) -> f32 {
    if x.is_finite() { cap * (x / cap).tanh() } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_stay_large_ones_reach_the_cap_and_overflows_show() {
        let mut x = [1e-3, -30.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        softcap(&mut x, 30.0);
        assert!((x[0] - 1e-3).abs() < 1e-9);
        // 30 tanh(1)
        assert!((x[1] + 22.847_825).abs() < 1e-5, "{}", x[1]);
        assert_eq!(x[2..6], [30.0, -30.0, f32::INFINITY, f32::NEG_INFINITY]);
        assert!(x[6].is_nan());
    }
}
