//! [`attention`](super::attention::attention) with a sink for each head: a score of its own that
//! belongs to no position and only adds to the sum of weights.

use super::attention::{Attention, with_sinks};
use super::kv_write::Cache;

/// `sinks` has one score a head.
pub fn attention_sinks(
    q: &[f32],
    cache: &Cache,
    blocks: &[u32],
    params: &Attention,
    sinks: &[f32],
    out: &mut [f32],
) {
    with_sinks(q, cache, blocks, params, Some(sinks), out);
}
