//! [`expert_sum`](super::expert_sum::expert_sum) with a bias of each expert, added to its output.

/// `pairs` is `[T, top_k, hidden]`, `weights` and `ids` `[T, top_k]`, `biases` `[experts, hidden]`.
pub fn expert_sum_biased(
    pairs: &[f32],
    weights: &[f32],
    ids: &[u32],
    biases: &[f32],
    top_k: usize,
    out: &mut [f32],
) {
    let hidden = out.len() * top_k / weights.len();
    let rows = pairs.chunks_exact(top_k * hidden).zip(weights.chunks_exact(top_k));
    for ((out, (pairs, weights)), ids) in
        out.chunks_exact_mut(hidden).zip(rows).zip(ids.chunks_exact(top_k))
    {
        out.fill(0.0);
        for ((pair, weight), id) in pairs.chunks_exact(hidden).zip(weights).zip(ids) {
            let bias = &biases[*id as usize * hidden..][..hidden];
            for ((out, x), bias) in out.iter_mut().zip(pair).zip(bias) {
                *out += weight * (x + bias);
            }
        }
    }
}
