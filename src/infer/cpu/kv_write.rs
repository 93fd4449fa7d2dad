//! Appends a batch's keys and values to a layer's cache.

/// One layer's cache, `[kv_heads, context, head_dim]` each: a head's positions lie together.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Cache {
    pub fn new(kv_heads: usize, head_dim: usize, context: usize) -> Self {
        let zeros = vec![0.0; kv_heads * head_dim * context];
        Self { kv_heads, head_dim, context, k: zeros.clone(), v: zeros }
    }

    /// Positions `range` of a head, in keys or values.
    pub fn head<'a>(&self, of: &'a [f32], head: usize, range: std::ops::Range<usize>) -> &'a [f32] {
        let first = head * self.context;
        &of[(first + range.start) * self.head_dim..(first + range.end) * self.head_dim]
    }
}

/// Writes `k` and `v`, `[T, kv_heads * head_dim]` each, at `position..position + T`.
pub fn kv_write(k: &[f32], v: &[f32], position: usize, cache: &mut Cache) {
    let Cache { kv_heads, head_dim, context, .. } = *cache;
    for (from, to) in [(k, &mut cache.k), (v, &mut cache.v)] {
        for (t, row) in from.chunks_exact(kv_heads * head_dim).enumerate() {
            for (head, from) in row.chunks_exact(head_dim).enumerate() {
                let at = (head * context + position + t) * head_dim;
                to[at..at + head_dim].copy_from_slice(from);
            }
        }
    }
}
