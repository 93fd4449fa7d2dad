//! RMS norm of one token's row, packed for the products that follow.

use super::pack::pack;

/// Packs `x / sqrt(mean(x^2) + eps) * weight` (`[cols]` each) into `packed`, a packed vector of
/// `cols`.
pub fn decode_norm(x: &[f32], weight: &[f32], eps: f32, packed: &mut [u32]) {
    let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = 1.0 / (square / x.len() as f64 + f64::from(eps)).sqrt();
    let normed = x.iter().zip(weight).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32);
    pack(&normed.collect::<Vec<_>>(), packed);
}
