//! `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over each row of `weight.len()` elements
//! (Ba, Kiros and Hinton, 2016).

/// Normalises each row of `x` in place. Without a bias, nothing is added.
pub fn layer_norm(x: &mut [f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) {
    let count = weight.len() as f64;
    for row in x.chunks_exact_mut(weight.len()) {
        let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
        let squares = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
        let scale = 1.0 / (squares / count + f64::from(eps)).sqrt();
        for (x, weight) in row.iter_mut().zip(weight) {
            *x = ((f64::from(*x) - mean) * scale) as f32 * *weight;
        }
        if let Some(bias) = bias {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += *bias);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_get_mean_0_and_variance_1_before_weight_and_bias() {
        // Mean 1000, deviation 2: the squares' mean alone would lose the variance.
        let mut x = [998.0, 1002.0, 998.0, 1002.0, 1.0, 1.0, 1.0, 1.0];
        layer_norm(&mut x, &[1.0, 2.0, -1.0, 0.5], Some(&[0.5, 0.0, 0.0, 1.0]), 0.0625);
        let one = 2.0 / (4.0f32 + 0.0625).sqrt();
        let want = [0.5 - one, 2.0 * one, one, 1.0 + 0.5 * one, 0.5, 0.0, 0.0, 1.0];
        for (got, want) in x.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{x:?}");
        }
        let mut bare = [998.0, 1002.0];
        layer_norm(&mut bare, &[1.0, 1.0], None, 0.0);
        assert_eq!(bare, [-1.0, 1.0]);
    }
}
