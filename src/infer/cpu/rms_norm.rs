//! `x / sqrt(mean(x^2) + eps) * weight` over each group of `weight.len()`
//! elements (Zhang and Sennrich, 2019).

use pulp::Arch;

use super::simd;

/// Normalises each group of `x` in place.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let arch = Arch::new();
    for group in x.chunks_exact_mut(weight.len()) {
        let mean = simd::dot(arch, group, group) / weight.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        arch.dispatch(|| {
            for (x, weight) in group.iter_mut().zip(weight) {
                *x = *x * scale * *weight;
            }
        });
    }
}
