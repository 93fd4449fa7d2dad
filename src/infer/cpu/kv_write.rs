//! Appends a batch's keys and values to a layer's cache.
//!
//! Here a half-precision cache holds f32 values that an f16 can represent exactly. So attention
//! reads the same numbers as on a device, without the cost of converting them.

use std::ops::Range;

use half::f16;

use crate::backend::KvFormat;
use crate::kv::BLOCK;

/// One layer's cache, `[blocks, kv_heads, BLOCK, head_dim]` each: a head's positions within a block
/// are contiguous.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub format: KvFormat,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Cache {
    /// Room for `count` blocks.
    pub fn new(kv_heads: usize, head_dim: usize, count: usize, format: KvFormat) -> Self {
        // Untouched zeros take no memory.
        let zeros = || vec![0.0; count * BLOCK * kv_heads * head_dim];
        Self { kv_heads, head_dim, format, k: zeros(), v: zeros() }
    }

    /// Elements of a block, for keys or for values alone.
    pub const fn block_len(&self) -> usize {
        BLOCK * self.kv_heads * self.head_dim
    }

    /// Makes room for `count` blocks. Keeps the contents.
    pub fn grow(&mut self, count: usize) {
        let len = (count * self.block_len()).max(self.k.len());
        self.k.resize(len, 0.0);
        self.v.resize(len, 0.0);
    }

    /// Copies a block's keys and values.
    pub fn copy(&mut self, from: usize, to: usize) {
        let len = self.block_len();
        for of in [&mut self.k, &mut self.v] {
            of.copy_within(from * len..(from + 1) * len, to * len);
        }
    }

    /// Bytes of a block's keys, or of its values, as they are read and written: in the cache's format,
    /// little-endian.
    pub const fn half_bytes(&self) -> usize {
        let size = match self.format {
            KvFormat::F32 => size_of::<f32>(),
            KvFormat::F16 => size_of::<f16>(),
        };
        self.block_len() * size
    }

    /// Appends a block's keys and values to `bytes`.
    pub fn read(&self, block: usize, bytes: &mut Vec<u8>) {
        let len = self.block_len();
        for of in [&self.k, &self.v] {
            let of = &of[block * len..(block + 1) * len];
            match self.format {
                KvFormat::F32 => bytes.extend(of.iter().flat_map(|x| x.to_le_bytes())),
                // The cache holds nothing that an f16 cannot represent.
                KvFormat::F16 => {
                    bytes.extend(of.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
                }
            }
        }
    }

    /// Sets a block's keys and values: twice [`Cache::half_bytes`] bytes.
    pub fn write(&mut self, block: usize, bytes: &[u8]) {
        let (len, half, format) = (self.block_len(), self.half_bytes(), self.format);
        for (of, bytes) in [&mut self.k, &mut self.v].into_iter().zip(bytes.chunks_exact(half)) {
            let of = of[block * len..(block + 1) * len].iter_mut();
            match format {
                KvFormat::F32 => {
                    let all = bytes.as_chunks().0.iter();
                    of.zip(all).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
                }
                KvFormat::F16 => {
                    let all = bytes.as_chunks().0.iter();
                    of.zip(all).for_each(|(x, bytes)| *x = f16::from_le_bytes(*bytes).to_f32());
                }
            }
        }
    }

    /// Where a head's elements at a position begin, in keys or in values.
    pub const fn at(&self, blocks: &[u32], head: usize, position: usize) -> usize {
        let block = blocks[position / BLOCK] as usize;
        ((block * self.kv_heads + head) * BLOCK + position % BLOCK) * self.head_dim
    }

    /// Positions `range` of a head, in keys or values, block by block.
    pub fn head<'a>(
        &self,
        of: &'a [f32],
        blocks: &[u32],
        head: usize,
        range: Range<usize>,
    ) -> impl Iterator<Item = &'a [f32]> {
        let Range { start, end } = range;
        (start / BLOCK..end.div_ceil(BLOCK)).map(move |number| {
            let first = start.max(number * BLOCK);
            let count = end.min((number + 1) * BLOCK) - first;
            &of[self.at(blocks, head, first)..][..count * self.head_dim]
        })
    }
}

/// Writes `k` and `v`, `[T, kv_heads * head_dim]` each, at `position..position + T`, which lie in `blocks`. Returns
/// how many elements were clamped.
pub fn kv_write(k: &[f32], v: &[f32], position: usize, blocks: &[u32], cache: &mut Cache) -> u64 {
    let Cache { kv_heads, head_dim, format, .. } = *cache;
    let mut clamped = 0;
    for (t, (k, v)) in
        k.chunks_exact(kv_heads * head_dim).zip(v.chunks_exact(kv_heads * head_dim)).enumerate()
    {
        let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let at = cache.at(blocks, head, position + t);
            for (from, to) in [(k, &mut cache.k), (v, &mut cache.v)] {
                let to = &mut to[at..at + head_dim];
                match format {
                    KvFormat::F32 => to.copy_from_slice(from),
                    KvFormat::F16 => {
                        to.iter_mut().zip(from).for_each(|(to, x)| *to = halved(*x));
                        clamped +=
                            from.iter().filter(|x| x.abs() > f16::MAX.to_f32()).count() as u64;
                    }
                }
            }
        }
    }
    clamped
}

/// The nearest finite f16. Clamped, because an infinite element would make every later token's
/// attention NaN.
fn halved(x: f32) -> f32 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_f32()
}
