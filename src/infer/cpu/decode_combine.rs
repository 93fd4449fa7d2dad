//! Combines the splits of `decode_attention`, packed for the product that follows.

use super::decode_attention::{Attention, Splits};
use super::pack::pack;

/// `partial` is `[heads, splits, head_dim + 4]` as `decode_attention` writes it. `packed` receives
/// a packed vector of `heads * head_dim`: each head's weighted values divided by the sum of
/// weights, as one softmax over all splits.
pub fn decode_combine(params: &Attention, position: usize, partial: &[f32], packed: &mut [u32]) {
    let dim = params.head_dim;
    let splits = Splits::of(position, params.window, params.splits_max).count;
    let mut out = Vec::with_capacity(params.heads * dim);
    for head in partial.chunks_exact(splits * (dim + 4)).take(params.heads) {
        let parts = || head.chunks_exact(dim + 4);
        let most = parts().fold(f32::NEG_INFINITY, |most, part| most.max(part[dim]));
        let factor = |part: &[f32]| (f64::from(part[dim]) - f64::from(most)).exp();
        let total: f64 = parts().map(|part| factor(part) * f64::from(part[dim + 1])).sum();
        let sum = |i: usize| parts().map(|part| factor(part) * f64::from(part[i])).sum::<f64>();
        out.extend((0..dim).map(|i| (sum(i) / total) as f32));
    }
    pack(&out, packed);
}
