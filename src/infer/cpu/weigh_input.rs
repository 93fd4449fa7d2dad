//! `out = x * sigmoid(the largest logit)`, row by row: what an expert that is chosen alone is given.

/// `x` and `out` are `[T, width]`, `logits` `[T, count]`.
pub fn weigh_input(x: &[f32], logits: &[f32], count: usize, out: &mut [f32]) {
    let width = x.len() / (logits.len() / count);
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for ((x, out), logits) in rows.zip(logits.chunks_exact(count)) {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let factor = 1.0 / (1.0 + (-best).exp());
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor);
    }
}
