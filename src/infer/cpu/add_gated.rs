//! `x += sigmoid(gate) * y`, with one gate for each row.

/// `x` and `y` are `[T, width]`, `gate` is `[T]`.
pub fn add_gated(x: &mut [f32], y: &[f32], gate: &[f32]) {
    let width = x.len() / gate.len();
    let rows = x.chunks_exact_mut(width).zip(y.chunks_exact(width));
    for ((x, y), gate) in rows.zip(gate) {
        let factor = 1.0 / (1.0 + (-gate).exp());
        x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
    }
}
