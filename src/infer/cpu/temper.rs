//! `x *= 1 + scale * ln(1 + floor((position + 1) / each))`: queries grow with their position.

/// `x` is `[T, width]`; the first row's token is at `position`, the others follow it.
pub fn temper(x: &mut [f32], width: usize, position: usize, each: usize, scale: f32) {
    for (t, row) in x.chunks_exact_mut(width).enumerate() {
        let steps = ((position + t + 1) / each) as f32;
        let factor = 1.0 + scale * steps.ln_1p();
        row.iter_mut().for_each(|x| *x *= factor);
    }
}
