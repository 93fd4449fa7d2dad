//! [`decode_combine`](super::decode_combine::decode_combine) with a sink for each head.

use super::decode_attention::{Attention, Splits};
use super::pack::pack;

/// `sinks` has one score a head, which belongs to no position and only adds to the sum of weights.
pub fn decode_combine_sinks(
    params: &Attention,
    position: usize,
    partial: &[f32],
    sinks: &[f32],
    packed: &mut [u32],
) {
    let dim = params.head_dim;
    let splits = Splits::of(position, params.window, params.splits_max).count;
    let mut out = Vec::with_capacity(params.heads * dim);
    for (head, sink) in partial.chunks_exact(splits * (dim + 4)).take(params.heads).zip(sinks) {
        let parts = || head.chunks_exact(dim + 4);
        let most = parts().fold(*sink, |most, part| most.max(part[dim]));
        let factor = |score: f32| (f64::from(score) - f64::from(most)).exp();
        let sum =
            |i: usize| parts().map(|part| factor(part[dim]) * f64::from(part[i])).sum::<f64>();
        let total = factor(*sink) + sum(dim + 1);
        out.extend((0..dim).map(|i| (sum(i) / total) as f32));
    }
    pack(&out, packed);
}
