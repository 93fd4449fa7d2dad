//! Layer norm of one token's row, packed for the products that follow.

use super::pack::pack;

/// Packs `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (`[cols]` each) into `packed`, a
/// packed vector of `cols`.
pub fn decode_layer_norm(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    packed: &mut [u32],
) {
    let count = x.len() as f64;
    let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let squares: f64 = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
    let scale = 1.0 / (squares / count + f64::from(eps)).sqrt();
    let normed = x.iter().zip(weight).enumerate().map(|(i, (x, w))| {
        let bias = bias.map_or(0.0, |bias| f64::from(bias[i]));
        ((f64::from(*x) - mean) * scale * f64::from(*w) + bias) as f32
    });
    pack(&normed.collect::<Vec<_>>(), packed);
}
