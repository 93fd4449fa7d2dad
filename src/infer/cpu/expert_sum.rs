//! `out[T, hidden] = sum_j weight_j * pair_j`, in the order of choice.
//!
//! The order is fixed so that the order in which experts were paged in never changes a bit.

/// `pairs` is `[T, top_k, hidden]`, `weights` `[T, top_k]`.
pub fn expert_sum(pairs: &[f32], weights: &[f32], top_k: usize, out: &mut [f32]) {
    let hidden = out.len() * top_k / weights.len();
    let rows = pairs.chunks_exact(top_k * hidden).zip(weights.chunks_exact(top_k));
    for (out, (pairs, weights)) in out.chunks_exact_mut(hidden).zip(rows) {
        out.fill(0.0);
        for (pair, weight) in pairs.chunks_exact(hidden).zip(weights) {
            for (out, x) in out.iter_mut().zip(pair) {
                *out += weight * x;
            }
        }
    }
}
