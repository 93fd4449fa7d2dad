//! One token's attention, by splits of the positions that it sees (flash decoding: Dao et al.,
//! 2023), over an f16 cache to which its key and value are added first.
//!
//! A split is a number of whole tiles of 32 positions, the same for all splits. Its result for a
//! head is relative to its own highest score; `decode_combine` combines the splits.

use std::ops::Range;

use half::f16;

use crate::kv::row;

/// Positions of one tile (kernels/shared/splits.wgsl).
pub const TILE: usize = 32;

/// How the positions that a token sees are divided into splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Splits {
    /// The positions seen.
    first: usize,
    end: usize,
    pub count: usize,
    /// Tiles of one split.
    pub tiles_each: usize,
}

impl Splits {
    /// At most `most` splits. The token sees the last `window` positions up to its own.
    pub fn of(position: usize, window: Option<usize>, most: usize) -> Self {
        let end = position + 1;
        let first = window.map_or(0, |window| end.saturating_sub(window));
        let tiles = (end - first).div_ceil(TILE);
        let tiles_each = tiles.div_ceil(most);
        Self { first, end, count: tiles.div_ceil(tiles_each), tiles_each }
    }

    /// The positions of a split.
    pub fn range(&self, split: usize) -> Range<usize> {
        let first = self.first + split * self.tiles_each * TILE;
        first..(first + self.tiles_each * TILE).min(self.end)
    }
}

/// The shape of a layer's attention.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The pairs `(i, i + pairs)` of a head are rotated.
    pub pairs: usize,
    pub window: Option<usize>,
    pub splits_max: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// Norm weights for the heads of queries and of keys.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub eps: f32,
}

/// A layer's keys and values, `[blocks, BLOCK, kv_heads, head_dim]` each, and the blocks that
/// belong to the sequence.
#[derive(Debug)]
pub struct Caches<'a> {
    pub blocks: &'a [u32],
    pub keys: &'a mut [f16],
    pub values: &'a mut [f16],
}

impl Attention {
    /// Where the result of a head's `split` begins in `partial`: `head_dim` sums of weighted
    /// values, the highest score, the sum of weights, two unused words.
    pub const fn partial_at(&self, head: usize, split: usize, splits: usize) -> usize {
        (head * splits + split) * (self.head_dim + 4)
    }

    /// A head, normalised (if `norm` gives weights and epsilon) and rotated by `rotations`, the
    /// (cos, sin) of each pair.
    pub fn rotated(
        &self,
        head: &[f32],
        norm: Option<(&[f32], f32)>,
        rotations: &[[f32; 2]],
    ) -> Vec<f64> {
        let mut out: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        if let Some((weight, eps)) = norm {
            let square: f64 = out.iter().map(|x| x * x).sum();
            let scale = 1.0 / (square / out.len() as f64 + f64::from(eps)).sqrt();
            out.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * f64::from(*w));
        }
        for (i, rotation) in rotations[..self.pairs].iter().enumerate() {
            let [cos, sin] = rotation.map(f64::from);
            let (a, b) = (out[i], out[i + self.pairs]);
            out[i] = a * cos - b * sin;
            out[i + self.pairs] = b * cos + a * sin;
        }
        out
    }

    /// A score as it is weighed.
    pub fn capped(&self, score: f64) -> f64 {
        self.softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
    }

    /// Each head's normalised and rotated query times the scale, `[heads, head_dim]`.
    pub fn queries(
        &self,
        qkv: &[f32],
        norms: Option<HeadNorms<'_>>,
        rotations: &[[f32; 2]],
    ) -> Vec<f64> {
        let scale = f64::from(self.scale);
        let heads = qkv.chunks_exact(self.head_dim).take(self.heads);
        let rotated =
            heads.flat_map(|head| self.rotated(head, norms.map(|n| (n.q, n.eps)), rotations));
        rotated.map(|x| x * scale).collect()
    }

    /// Attention of `queries` (`[heads, head_dim]`) at `position`, whose key and value are already
    /// in the cache, in `blocks`.
    pub fn attend(
        &self,
        position: usize,
        queries: &[f64],
        blocks: &[u32],
        [keys, values]: [&[f16]; 2],
        partial: &mut [f32],
    ) {
        let dim = self.head_dim;
        let splits = Splits::of(position, self.window, self.splits_max);
        let group = self.heads / self.kv_heads;
        for (head, query) in queries.chunks_exact(dim).enumerate() {
            let of = |p: usize| {
                let at = (row(blocks, p) * self.kv_heads + head / group) * dim;
                at..at + dim
            };
            for split in 0..splits.count {
                let score = |p| {
                    let pairs = query.iter().zip(&keys[of(p)]);
                    self.capped(pairs.map(|(q, k)| q * k.to_f64()).sum())
                };
                let scores: Vec<f64> = splits.range(split).map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut sums = vec![0.0; dim];
                let mut total = 0.0;
                for (p, score) in splits.range(split).zip(scores) {
                    let weight = (score - most).exp();
                    total += weight;
                    for (sum, v) in sums.iter_mut().zip(&values[of(p)]) {
                        *sum += weight * v.to_f64();
                    }
                }
                let part = &mut partial[self.partial_at(head, split, splits.count)..][..dim + 2];
                part.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum as f32);
                (part[dim], part[dim + 1]) = (most as f32, total as f32);
            }
        }
    }
}

/// `qkv` is the token's queries, keys and values (`[heads + 2 kv_heads, head_dim]`) as the products
/// wrote them. `rotations` are the position's (cos, sin), `[pairs]`. `partial` is
/// `[heads, splits, head_dim + 4]`. Returns how many elements were clamped in the caches.
pub fn decode_attention(
    params: &Attention,
    position: usize,
    qkv: &[f32],
    norms: Option<HeadNorms<'_>>,
    rotations: &[[f32; 2]],
    Caches { blocks, keys, values }: Caches<'_>,
    partial: &mut [f32],
) -> u32 {
    let Attention { heads, kv_heads, head_dim: dim, .. } = *params;
    let mut clamped = 0;
    let mut put = |to: &mut f16, x: f64| {
        clamped += u32::from(x.abs() > f16::MAX.to_f64());
        *to = halved(x);
    };
    let fresh = qkv[heads * dim..].chunks_exact(dim);
    for (head, (key, value)) in fresh.clone().zip(fresh.skip(kv_heads)).enumerate() {
        let at = (row(blocks, position) * kv_heads + head) * dim;
        let key = params.rotated(key, norms.map(|n| (n.k, n.eps)), rotations);
        keys[at..at + dim].iter_mut().zip(key).for_each(|(to, x)| put(to, x));
        values[at..at + dim].iter_mut().zip(value).for_each(|(to, x)| put(to, f64::from(*x)));
    }
    let queries = params.queries(qkv, norms, rotations);
    params.attend(position, &queries, blocks, [keys, values], partial);
    clamped
}

/// The nearest finite f16, as in `kv_write`.
fn halved(x: f64) -> f16 {
    f16::from_f64(x.clamp(f16::MIN.to_f64(), f16::MAX.to_f64()))
}
