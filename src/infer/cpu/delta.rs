//! A gated delta net (Yang et al., arXiv 2412.06464): each value head keeps a matrix `S`; for each
//! token `S *= exp(g)`, `S += k (beta (v - k S))`, and the result is `q S`.

use rayon::prelude::*;

use crate::graph::DeltaShape;

/// The added square of a length, as in the reference implementations.
const EPS: f32 = 1e-6;

/// `x` is `[T, (2 key_heads * key_dim) + heads * value_dim]`: queries, keys and values. `gates` is
/// `[T, 2 heads]`: `b`, then `a`. `decays` and `shifts` are `[heads]`. `state`, `[heads, key_dim,
/// value_dim]`, is replaced. `out` is `[T, heads * value_dim]`.
pub fn delta(
    x: &[f32],
    gates: &[f32],
    (decays, shifts): (&[f32], &[f32]),
    shape: &DeltaShape,
    state: &mut [f32],
    out: &mut [f32],
) {
    let DeltaShape { key_heads, heads, key_dim, value_dim } = *shape;
    let row = shape.x_width();
    let mut results = vec![0.0; out.len()];
    let tokens = x.len() / row;
    let one = |(head, (state, results)): (usize, (&mut [f32], &mut [f32]))| {
        let key_head = head / (heads / key_heads);
        for (t, result) in results.chunks_exact_mut(value_dim).enumerate() {
            let (x, gates) = (&x[t * row..][..row], &gates[t * 2 * heads..][..2 * heads]);
            let part = |at: usize| unit(&x[at + key_head * key_dim..][..key_dim]);
            let (q, k) = (part(0), part(key_heads * key_dim));
            let v = &x[2 * key_heads * key_dim + head * value_dim..][..value_dim];
            let beta = 1.0 / (1.0 + (-gates[head]).exp());
            let decay = (-decays[head].exp() * softplus(gates[heads + head] + shifts[head])).exp();
            let mut known = vec![0.0; value_dim];
            for (k, state) in k.iter().zip(state.chunks_exact_mut(value_dim)) {
                for (s, known) in state.iter_mut().zip(&mut known) {
                    *s *= decay;
                    *known += *s * k;
                }
            }
            let change: Vec<f32> =
                v.iter().zip(&known).map(|(v, known)| (v - known) * beta).collect();
            let scale = (key_dim as f32).sqrt();
            for ((q, k), state) in q.iter().zip(&k).zip(state.chunks_exact_mut(value_dim)) {
                for ((s, change), result) in state.iter_mut().zip(&change).zip(&mut *result) {
                    *s += k * change;
                    *result += *s * (q / scale);
                }
            }
        }
    };
    let states = state.par_chunks_exact_mut(key_dim * value_dim);
    states.zip(results.par_chunks_exact_mut(tokens * value_dim)).enumerate().for_each(one);
    // From head by head to token by token.
    for (head, results) in results.chunks_exact(tokens * value_dim).enumerate() {
        for (t, result) in results.chunks_exact(value_dim).enumerate() {
            out[(t * heads + head) * value_dim..][..value_dim].copy_from_slice(result);
        }
    }
}

/// The vector at unit length.
fn unit(x: &[f32]) -> Vec<f32> {
    let length = (x.iter().map(|x| x * x).sum::<f32>() + EPS).sqrt();
    x.iter().map(|x| x / length).collect()
}

/// `ln(1 + exp(v))`, without overflow.
fn softplus(v: f32) -> f32 {
    v.max(0.0) + (-v.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With one element a head, everything can be computed by hand.
    #[test]
    fn a_state_of_one_element_decays_and_learns() {
        let shape = DeltaShape { key_heads: 1, heads: 1, key_dim: 1, value_dim: 1 };
        let (mut state, mut out) = ([2.0], [0.0; 2]);
        // b = 0: half of the difference is learned. a + shift = ln(e - 1): softplus is 1.
        let a = (std::f32::consts::E - 1.0).ln() - 0.5;
        let x = [3.0, -1e3, 4.0, 1.0, 1e3, 0.0];
        delta(&x, &[0.0, a, 0.0, a], (&[0.0], &[0.5]), &shape, &mut state, &mut out);
        let decay = (-1.0_f32).exp();
        // The key is -1: what is known is -2 decay.
        let first = 2.0 * decay - (4.0 + 2.0 * decay) / 2.0;
        let second = first * decay / 2.0;
        for (got, want) in out.iter().chain(&state).zip([first, second, second]) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn batches_of_any_size_give_the_same_bits() {
        let shape = DeltaShape { key_heads: 2, heads: 4, key_dim: 3, value_dim: 5 };
        let row = shape.x_width();
        let number = |i: usize| ((i * 37 + 11) % 64) as f32 / 32.0 - 1.0;
        let x: Vec<f32> = (0..7 * row).map(number).collect();
        let gates: Vec<f32> = (0..7 * 8).map(|i| number(i + 5)).collect();
        let run = |sizes: &[usize]| {
            let (mut state, mut out, mut at) = (vec![0.0; 60], vec![0.0; 7 * 20], 0);
            for size in sizes {
                let (to, weights) = (at + size, (&[0.1, 0.2, 0.3, 0.4][..], &[0.5; 4][..]));
                let (x, gates) = (&x[at * row..to * row], &gates[at * 8..to * 8]);
                delta(x, gates, weights, &shape, &mut state, &mut out[at * 20..to * 20]);
                at = to;
            }
            (state, out)
        };
        assert_eq!(run(&[7]), run(&[1, 4, 2]));
    }
}
