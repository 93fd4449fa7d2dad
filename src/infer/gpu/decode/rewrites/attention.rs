//! Queries, keys and values with their head norms and rope, the cache, and attention: decode_linear
//! into one buffer, decode_attention over splits of the context, and decode_combine, which packs
//! the result.
//!
//! For f16 caches, heads of at most 256 elements and a multiple of eight, and biases on all three
//! products or on none.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Fuse, Rewritten};
use super::product::LinearArgs;
use super::{Biased, Ops};
use crate::backend::{KvFormat, Result};
use crate::cpu::pack::pieces;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::lower::{Place, recipe_grid, word};
use crate::graph::{Buf, Graph, KvId, Op, RopeId, WeightId};

/// kernels/decode_attention.wgsl
const HEAD_DIM_MAX: usize = 256;

/// Query heads of one key head in a workgroup of decode_attention.
const HEADS_TOGETHER: usize = 4;

/// Workgroups that occupy a big GPU: two for each of 132 multiprocessors.
const WORKGROUPS: usize = 264;

/// Bounds on a layer's splits: so that long contexts are divided whatever the heads, and that
/// decode_combine has few to read.
const SPLITS_LEAST: usize = 4;
const SPLITS_MOST: usize = 128;

/// Workgroups of decode_attention for one split.
fn workgroups_each(heads: usize, kv_heads: usize) -> usize {
    kv_heads * (heads / kv_heads.max(1)).div_ceil(HEADS_TOGETHER)
}

/// The most splits of one token's attention (kernels/shared/splits.wgsl): as many as occupy the
/// device. More would only cost, each its beginning and its part of decode_combine.
pub(in crate::gpu::decode) fn splits_max(heads: usize, kv_heads: usize) -> usize {
    (WORKGROUPS / workgroups_each(heads, kv_heads).max(1)).clamp(SPLITS_LEAST, SPLITS_MOST)
}

/// The ops of one attention, from the first product to the attention itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Attention {
    pub ops: usize,
    pub x: Buf,
    /// Queries, keys, values.
    pub qkv: [Biased; 3],
    /// Norm weights for the heads of queries and of keys.
    pub head_norms: Option<([WeightId; 2], f32)>,
    pub rope: RopeId,
    pub kv: KvId,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    /// One more score for each head.
    pub sinks: Option<WeightId>,
    pub out: Buf,
}

/// How heads are normalised and rotated.
struct Rotated {
    norm: Option<(WeightId, f32)>,
    heads: usize,
    head_dim: usize,
    rope: RopeId,
}

/// Matches a head norm (if there is one) and the rope op of `x`.
fn rotated(ops: &mut Ops<'_>, x: Buf) -> Option<Rotated> {
    let mut norm = None;
    if let Some(&Op::RmsNorm { x: from, weight, out, eps }) = ops.peek() {
        if from != x || out != x {
            return None;
        }
        norm = Some((weight, eps));
        ops.next();
    }
    let &Op::Rope { x: of, heads, head_dim, rope } = ops.next()? else { return None };
    let whole = |(weight, _): &(WeightId, f32)| ops.graph.weight_spec(*weight).cols == head_dim;
    let fits = of == x && ops.graph.width(x) == heads * head_dim && norm.iter().all(whole);
    fits.then_some(Rotated { norm, heads, head_dim, rope })
}

/// Matches an attention that begins at an op.
pub(super) fn matched(graph: &Graph, at: usize) -> Option<Attention> {
    let mut ops = Ops::new(graph, at);
    let &Op::Linear { x, .. } = ops.peek()? else { return None };
    let (wq, q) = ops.linear(x)?;
    let (wk, k) = ops.linear(x)?;
    let (wv, v) = ops.linear(x)?;
    let Rotated { norm: q_norm, heads, head_dim, rope } = rotated(&mut ops, q)?;
    let Rotated { norm: k_norm, heads: kv_heads, head_dim: k_dim, rope: k_rope } =
        rotated(&mut ops, k)?;
    let head_norms = match (q_norm, k_norm) {
        (None, None) => None,
        (Some((q, eps)), Some((k, k_eps))) if eps == k_eps => Some(([q, k], eps)),
        _ => return None,
    };
    let &Op::KvWrite { kv, k: k_from, v: v_from } = ops.next()? else { return None };
    let (of, q_from, out, all, scale, window, softcap, causal, sinks) = match *ops.next()? {
        Op::Attention { kv, q, out, heads, scale, window, softcap, causal } => {
            (kv, q, out, heads, scale, window, softcap, causal, None)
        }
        Op::AttendSinks { kv, q, out, heads, scale, window, sinks } => {
            (kv, q, out, heads, scale, window, None, true, Some(sinks))
        }
        _ => return None,
    };
    let cache = graph.kv_spec(kv);
    let same = (k_from, v_from, q_from, of, all) == (k, v, q, kv, heads)
        && (k_dim, k_rope) == (head_dim, rope)
        && (cache.kv_heads, cache.head_dim) == (kv_heads, head_dim);
    let apart = q != k && k != v && v != q && ![q, k, v].contains(&x);
    let shared_by = heads.checked_div(kv_heads)?;
    let biases = [wq.1, wk.1, wv.1].iter().flatten().count();
    let rows = [(wq, heads), (wk, kv_heads), (wv, kv_heads)];
    let rows = rows.iter().all(|((id, _), n)| graph.weight_spec(*id).rows == n * head_dim);
    let fits = causal
        && head_dim.is_multiple_of(8)
        && head_dim <= HEAD_DIM_MAX
        && 2 * graph.rope_spec(rope).inv_freq.len() <= head_dim
        && heads == shared_by * kv_heads
        && shared_by > 0
        && window != Some(0)
        && softcap != Some(0.0)
        && graph.width(v) == kv_heads * head_dim
        && graph.width(out) == heads * head_dim
        && rows
        && (biases == 0 || biases == 3);
    let unread = [q, k, v].into_iter().all(|buf| buf == out || ops.dead(buf));
    (same && apart && fits && unread).then_some(Attention {
        ops: ops.at - at,
        x,
        qkv: [wq, wk, wv],
        head_norms,
        rope,
        kv,
        heads,
        kv_heads,
        head_dim,
        scale,
        window,
        softcap,
        sinks,
        out,
    })
}

pub(super) fn attention(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let lower = &fuse.lower;
    let Some(found) = matched(lower.graph, at).filter(|_| lower.kv == KvFormat::F16) else {
        return Ok(None);
    };
    let Attention { x, kv, heads, kv_heads, head_dim, rope, scale, out, .. } = found;
    let ids = found.qkv.map(|(id, _)| id);
    let bias = match found.qkv.map(|(_, bias)| bias) {
        [Some(q), Some(k), Some(v)] => {
            for id in [q, k, v] {
                lower.vector(id)?;
            }
            Some(Place::Biases([q, k, v]))
        }
        _ => None,
    };
    let product = LinearArgs { x, bias, result: Place::Qkv, adds: false };
    let mut recipes = fuse.linear(&ids, &product)?;

    let (norms, eps) = match found.head_norms {
        Some(([q, k], eps)) => ([lower.vector(q)?, lower.vector(k)?], eps),
        None => ([Place::Empty; 2], 0.0),
    };
    let [wide, wide_kv, dim] = [word(heads)?, word(kv_heads)?, word(head_dim)?];
    let window = word(found.window.unwrap_or(0))?;
    let splits_max = word(splits_max(heads, kv_heads))?;
    let attend = params::Attention {
        heads: wide,
        kv_heads: wide_kv,
        head_dim: dim,
        pairs: word(lower.graph.rope_spec(rope).inv_freq.len())?,
        window,
        splits_max,
        normed: u32::from(found.head_norms.is_some()),
        eps,
        scale,
        softcap: found.softcap.unwrap_or(0.0),
    };
    let [q_norm, k_norm] = norms;
    let (keys, values, rope_table) = (Place::Keys(kv), Place::Values(kv), Place::RopeTable(rope));
    let (partial, blocks) = (Place::Partial, Place::BlockTable);
    let storage = [Place::Qkv, q_norm, k_norm, rope_table, keys, values, partial, blocks];
    let each = word(workgroups_each(heads, kv_heads))?;
    let grid = Grid::Splits { each, window, most: splits_max };
    let together = fuse.together();
    recipes.push(fuse.in_teams(&format!("decode_attention{together}"), &attend, &storage, grid));

    let lower = &fuse.lower;
    let width = heads * head_dim;
    let pieces = word(pieces(width))?;
    let combine = params::Combine { heads: wide, head_dim: dim, window, splits_max, pieces };
    let groups = fuse.grid(width.div_ceil(64))?;
    let sinks = found.sinks.map(|sinks| lower.biases(sinks, heads)).transpose()?;
    let kernel = if sinks.is_some() { "decode_combine_sinks" } else { "decode_combine" };
    let mut storage = vec![Place::Partial, Place::Packed(out)];
    storage.extend(sinks);
    let kernel = format!("{kernel}{together}");
    recipes.push(recipe_grid(&kernel, &combine, &storage, Rows::Tokens, groups));
    let (reads, writes) = ([(x, Form::Packed)], [(out, Form::Packed)]);
    Ok(Some(Rewritten::new(found.ops, recipes, &reads, &writes).lasting()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_occupy_a_device_whatever_the_heads() {
        // Four heads or fewer a key head, eight, one; one key head; more key heads than workgroups.
        let shapes = [(32, 8), (16, 8), (32, 4), (32, 32), (4, 1), (512, 512)];
        assert_eq!(shapes.map(|(heads, kv)| splits_max(heads, kv)), [33, 33, 33, 8, 128, 4]);
    }
}
