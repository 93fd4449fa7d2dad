//! Appends a batch's keys and values to a layer's cache.
//!
//! A cache in half precision holds f32 here that an f16 can hold exactly: attention
//! reads the same numbers as on a device, at this processor's own speed.

use half::f16;

use crate::backend::KvFormat;

/// One layer's cache, `[kv_heads, context, head_dim]` each: a head's positions lie together.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub format: KvFormat,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Cache {
    pub fn new(kv_heads: usize, head_dim: usize, context: usize, format: KvFormat) -> Self {
        let zeros = vec![0.0; kv_heads * head_dim * context];
        Self { kv_heads, head_dim, context, format, k: zeros.clone(), v: zeros }
    }

    /// Positions `range` of a head, in keys or values.
    pub fn head<'a>(&self, of: &'a [f32], head: usize, range: std::ops::Range<usize>) -> &'a [f32] {
        let first = head * self.context;
        &of[(first + range.start) * self.head_dim..(first + range.end) * self.head_dim]
    }
}

/// Writes `k` and `v`, `[T, kv_heads * head_dim]` each, at `position..position + T`.
pub fn kv_write(k: &[f32], v: &[f32], position: usize, cache: &mut Cache) {
    let Cache { kv_heads, head_dim, context, format, .. } = *cache;
    for (from, to) in [(k, &mut cache.k), (v, &mut cache.v)] {
        for (t, row) in from.chunks_exact(kv_heads * head_dim).enumerate() {
            for (head, from) in row.chunks_exact(head_dim).enumerate() {
                let at = (head * context + position + t) * head_dim;
                let to = &mut to[at..at + head_dim];
                match format {
                    KvFormat::F32 => to.copy_from_slice(from),
                    KvFormat::F16 => to.iter_mut().zip(from).for_each(|(to, x)| *to = halved(*x)),
                }
            }
        }
    }
}

/// The nearest finite f16. Clamped, because an infinite element would make every later
/// token's attention not a number.
fn halved(x: f32) -> f32 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_f32()
}
