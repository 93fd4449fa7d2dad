//! Causal grouped-query attention over the cache: `softmax(scale * q.k) v`.
//!
//! Query head `h` reads key/value head `h / (heads / kv_heads)`. With a window `w` a token sees the
//! last `w` positions, including its own. Scores may be capped (`softcap`). Unless causal, a token
//! also sees the batch's later ones, with a window the next `w - 1`.

use pulp::Arch;
use rayon::prelude::*;

use super::kv_write::Cache;
use super::simd;
use super::softcap::softcap;

/// The parameters that are the same for a whole batch.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    pub heads: usize,
    pub scale: f32,
    pub window: Option<usize>,
    /// A token sees only positions from the last multiple of it on.
    pub chunk: Option<usize>,
    pub softcap: Option<f32>,
    pub causal: bool,
    /// The first token's position.
    pub position: usize,
}

/// `q` and `out` are `[T, heads * head_dim]`. The cache already holds the batch's positions, in
/// `blocks`.
pub fn attention(q: &[f32], cache: &Cache, blocks: &[u32], params: &Attention, out: &mut [f32]) {
    with_sinks(q, cache, blocks, params, None, out);
}

/// The same, perhaps with one more score a head, which belongs to no position.
pub(super) fn with_sinks(
    q: &[f32],
    cache: &Cache,
    blocks: &[u32],
    params: &Attention,
    sinks: Option<&[f32]>,
    out: &mut [f32],
) {
    let head_dim = cache.head_dim;
    let group = params.heads / cache.kv_heads;
    let tokens = q.len() / (params.heads * head_dim);
    let one = |scores: &mut Vec<f32>, (i, (q, out)): (usize, (&[f32], &mut [f32]))| {
        let (token, head) = (i / params.heads, i % params.heads);
        let seen = params.position + token + 1;
        let start = params.window.map_or(0, |window| seen.saturating_sub(window));
        let start = params.chunk.map_or(start, |chunk| start.max((seen - 1) / chunk * chunk));
        let last = params.position + tokens;
        let end = match (params.causal, params.window) {
            (true, _) => seen,
            (false, None) => last,
            (false, Some(window)) => last.min((seen - 1).saturating_add(window)),
        };
        let keys = cache.head(&cache.k, blocks, head / group, start..end);
        let values = cache.head(&cache.v, blocks, head / group, start..end);
        attend(q, keys, values, (params, sinks.map(|sinks| sinks[head])), scores, out);
    };
    let work = params.heads * tokens * (params.position + tokens) * head_dim;
    if work < 1 << 14 {
        let mut scores = Vec::new();
        let pairs = q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
        pairs.enumerate().for_each(|pair| one(&mut scores, pair));
    } else {
        q.par_chunks_exact(head_dim)
            .zip(out.par_chunks_exact_mut(head_dim))
            .enumerate()
            .for_each_init(Vec::new, one);
    }
}

/// One query of one token over its visible positions, block by block.
fn attend<'a>(
    q: &[f32],
    keys: impl Iterator<Item = &'a [f32]>,
    values: impl Iterator<Item = &'a [f32]>,
    (params, sink): (&Attention, Option<f32>),
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let (arch, scale) = (Arch::new(), params.scale);
    scores.clear();
    for keys in keys {
        scores.extend(keys.chunks_exact(q.len()).map(|key| scale * simd::dot(arch, q, key)));
    }
    if let Some(cap) = params.softcap {
        softcap(scores, cap);
    }
    let max = scores.iter().copied().fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    let mut sum = sink.map_or(0.0, |sink| (sink - max).exp());
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    out.fill(0.0);
    let mut scores = scores.iter();
    for values in values {
        for (value, score) in values.chunks_exact(q.len()).zip(&mut scores) {
            simd::add_scaled(arch, out, value, *score / sum);
        }
    }
}
