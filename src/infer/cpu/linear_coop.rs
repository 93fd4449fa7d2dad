//! [`linear`](super::linear::linear) as cooperative matrices compute it: weights and
//! activations rounded to half precision, sums in f32.

use half::f16;

use super::halve::halve;
use super::matrix::Matrix;

/// `x` is `[T, weight.cols]`, `out` `[T, weight.rows]`, `bias` `[weight.rows]`.
pub fn linear_coop(x: &[f32], weight: Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    let rows: Vec<_> = x.chunks_exact(weight.cols).map(halve).collect();
    let mut weights = vec![0.0; weight.cols];
    for row in 0..weight.rows {
        weight.unpack_row(row, &mut weights);
        weights.iter_mut().for_each(|w| *w = f16::from_f32(*w).to_f32());
        for (token, (halves, scale)) in rows.iter().enumerate() {
            let products = weights.iter().zip(halves).map(|(w, x)| w * x.to_f32());
            let bias = bias.map_or(0.0, |bias| bias[row]);
            out[token * weight.rows + row] = products.sum::<f32>() * scale + bias;
        }
    }
}
