//! An RMS norm of one token's row, added to another row.

/// `x += y / sqrt(mean(y^2) + eps) * weight` (`[cols]` each).
pub fn decode_norm_add(y: &[f32], weight: &[f32], eps: f32, x: &mut [f32]) {
    let square: f64 = y.iter().map(|y| f64::from(*y).powi(2)).sum();
    let scale = 1.0 / (square / y.len() as f64 + f64::from(eps)).sqrt();
    for ((x, y), weight) in x.iter_mut().zip(y).zip(weight) {
        *x = (f64::from(*x) + f64::from(*y) * scale * f64::from(*weight)) as f32;
    }
}
