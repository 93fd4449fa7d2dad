//! One token's attention by splits: decode_attention, decode_combine.

use half::f16;

use super::{Check, EPS, HALF_LEAST, TEAM, compare, compare_packed, floats, halves, words};
use crate::cpu::decode_attention::{Attention, Caches, HeadNorms, Splits, decode_attention};
use crate::cpu::decode_combine::decode_combine;
use crate::cpu::decode_combine_sinks::decode_combine_sinks;
use crate::cpu::pack::{packed_words, pieces};
use crate::gpu::Reduction;
use crate::gpu::decode::params;
use crate::gpu::tests::alone::{Alone, Change};
use crate::gpu::tests::{Random, device};
use crate::kv::{self, BLOCK};

/// Values that f32 may flush to zero.
const FLUSHED: f64 = 1e-36;

/// A layer's attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    pub shape: Attention,
    pub normed: bool,
    /// Whether some of the token's keys and values do not fit f16.
    pub loud: bool,
}

/// `(heads, kv_heads, head_dim, pairs)`, a window and the most splits.
pub(super) fn layer(
    (heads, kv_heads, head_dim, pairs): (usize, usize, usize, usize),
    normed: bool,
    window: Option<usize>,
    splits_max: usize,
) -> Layer {
    let scale = 1.3 / (head_dim as f32).sqrt();
    let softcap = None;
    let shape = Attention { heads, kv_heads, head_dim, pairs, window, splits_max, scale, softcap };
    Layer { shape, normed, loud: false }
}

/// The length of each rotated element's pair, to which its rounding errors are relative.
fn lengths(shape: &Attention, rotated: &[f64]) -> Vec<f64> {
    let mut lengths: Vec<f64> = rotated.iter().map(|x| x.abs()).collect();
    for head in lengths.chunks_exact_mut(shape.head_dim) {
        for i in 0..shape.pairs {
            let length = head[i].hypot(head[i + shape.pairs]);
            (head[i], head[i + shape.pairs]) = (length, length);
        }
    }
    lengths
}

/// Rounding errors of a head's norm (squares, mean, root), its three factors and its rotation.
fn head_roundings(shape: &Attention) -> f64 {
    0.5 * ((shape.head_dim.div_ceil(32) + TEAM) as f64 + 3.5) + 2.0 + 3.0 + 3.0
}

/// The possible f32 error of each element of one head's result for a split.
fn slacks(
    shape: &Attention,
    splits: &Splits,
    split: usize,
    [query, lengths]: [&[f64]; 2],
    rows: impl Fn(usize) -> [Vec<f64>; 2],
) -> Vec<f64> {
    let dim = shape.head_dim;
    // Eighths of a row, each with four products and their sums.
    let roundings = head_roundings(shape) + (dim / 8 + 8) as f64;
    let lost = |x: f64| if x.abs() < HALF_LEAST { x.abs() } else { 0.0 };
    let scored = splits.range(split).map(|p| {
        let [key, value] = rows(p);
        let score: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
        let off = lengths.iter().zip(&key).map(|(q, k)| q * (roundings * EPS * k.abs() + lost(*k)));
        // A tanh is off by 8 units in all, a cap makes no error larger.
        let own = shape.softcap.map_or(0.0, |cap| 8.0 * EPS * f64::from(cap));
        (shape.capped(score), off.sum::<f64>() + own, value)
    });
    let scored: Vec<_> = scored.collect();
    let most = scored.iter().fold(f64::NEG_INFINITY, |most, of| most.max(of.0));
    let most_off = scored.iter().fold(0.0f64, |most, of| most.max(of.1));
    let tiles = splits.tiles_each as f64;
    let mut slack = vec![FLUSHED; dim + 4];
    for (score, off, value) in scored {
        let below = most - score;
        let weight = (-below).exp();
        // An exponential for each tile: off by 3 + 2 |x| units, its argument by one; a product, a sum of 32.
        let own = ((4.0 + 32.0) * tiles + 4.0 + 3.0 * below + TEAM as f64) * EPS;
        let off = weight * ((off + most_off).exp_m1() + own);
        for (slack, v) in slack.iter_mut().zip(value) {
            *slack += off * v.abs() + weight * lost(v);
        }
        slack[dim + 1] += off;
    }
    slack[dim] += most_off;
    slack
}

// Long: one shape, with all of its bindings.
pub(super) fn attention(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    layer: &Layer,
    position: usize,
) -> Check {
    let Layer { shape, normed, loud } = *layer;
    let Attention { heads, kv_heads, head_dim: dim, pairs, window, splits_max, scale, softcap } =
        shape;
    let what = format!("{layer:?} at {position}, {team}");
    let splits = Splits::of(position, window, splits_max);
    let seen = splits.range(0).start..position;
    let width = kv_heads * dim;
    // Everything that the token must not read is NaN: its own row, later rows, those before its
    // window.
    let mut cache = || {
        let mut rows = halves(random, (position + 2) * width, 3.0);
        let hidden = rows.chunks_exact_mut(width).enumerate().filter(|(p, _)| !seen.contains(p));
        hidden.for_each(|(_, row)| row.fill(f16::NAN));
        rows
    };
    let before = [cache(), cache()];
    let mut qkv: Vec<f32> = random.floats((heads + 2 * kv_heads) * dim);
    qkv.iter_mut().for_each(|x| *x *= 3.0);
    if loud {
        let at = (heads + random.below(kv_heads)) * dim + random.below(dim);
        (qkv[at], qkv[at + width]) = (1e9, -1e9);
    }
    let norms =
        [0, 1].map(|_| random.floats(dim).iter().map(|x| 1.0 + 0.5 * x).collect::<Vec<_>>());
    let eps = 0.1;
    let head_norms = normed.then_some(HeadNorms { q: &norms[0], k: &norms[1], eps });
    let mut rotations = vec![[f32::NAN; 2]; (position + 2) * pairs];
    let own = &mut rotations[position * pairs..][..pairs];
    own.iter_mut().for_each(|rotation| {
        let (sin, cos) = (random.float() * 3.2).sin_cos();
        *rotation = [1.1 * cos, 1.1 * sin];
    });
    let own = own.to_vec();

    // The sequence's blocks are in reverse order, after one that belongs to no one.
    let count = (position + 2).div_ceil(BLOCK) as u32;
    let blocks: Vec<u32> = (1..=count).rev().collect();
    let spread = |rows: &Vec<f16>| {
        let mut all = vec![f16::NAN; (count as usize + 1) * BLOCK * width];
        for (p, row) in rows.chunks_exact(width).enumerate() {
            all[kv::row(&blocks, p) * width..][..width].copy_from_slice(row);
        }
        all
    };
    let gather = |all: &[f16]| -> Vec<f16> {
        let row = |p| &all[kv::row(&blocks, p) * width..][..width];
        (0..position + 2).flat_map(row).copied().collect()
    };
    let mut want_cache = before.each_ref().map(spread);
    let mut clamped = 0;
    let parts = heads * splits.count * (dim + 4);
    let untouched = random.floats(parts);
    let mut want = untouched.clone();
    {
        let [keys, values] = &mut want_cache;
        let caches = Caches { blocks: &blocks, keys, values };
        clamped += decode_attention(&shape, position, &qkv, head_norms, &own, caches, &mut want);
    }
    let want_cache = want_cache.each_ref().map(|all| gather(all));
    let p = params::Attention {
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: dim as u32,
        pairs: pairs as u32,
        window: window.unwrap_or(0) as u32,
        splits_max: splits_max as u32,
        normed: u32::from(normed),
        eps,
        scale,
        softcap: softcap.unwrap_or(0.0),
    };
    // Without norms the bindings are dummies.
    let [q_norm, k_norm] = norms.each_ref().map(|of| if normed { words(of) } else { vec![0; 4] });
    let [keys, values] = before.each_ref().map(|of| bytemuck::pod_collect_to_vec(&spread(of)));
    let blocks_table = [&[0], &blocks[..], &[0, 0]].concat();
    let table = words(rotations.as_flattened());
    let buffers =
        [words(&qkv), q_norm, k_norm, table, keys, values, words(&untouched), blocks_table];
    let groups = kv_heads * (heads / kv_heads).div_ceil(4) * splits.count;
    let name = format!("decode_attention_{team}");
    let got = alone.run(&name, position, &p, &buffers, (groups as u32, 1));

    // In the caches, including the twin's, only the token's row may have changed, rounded to f16
    // either way.
    let cached = [&got[4], &got[5]].map(|of| gather(&bytemuck::pod_collect_to_vec::<u32, f16>(of)));
    let norm = head_norms.map(|n| (n.k, n.eps));
    let fresh = qkv[heads * dim..].chunks_exact(dim);
    let keys = fresh.clone().take(kv_heads).flat_map(|head| shape.rotated(head, norm, &own));
    let keys: Vec<f64> = keys.collect();
    let values: Vec<f64> = fresh.skip(kv_heads).flatten().map(|x| f64::from(*x)).collect();
    let key_off = lengths(&shape, &keys).into_iter().map(|x| x * head_roundings(&shape) * EPS);
    let offs = [key_off.collect(), vec![0.0; width]];
    // An element right at the end of the range may count as inside or outside.
    let near = |x: &&f64| (x.abs() / f16::MAX.to_f64() - 1.0).abs() < 1e-4;
    let unsure = keys.iter().filter(near).count() as u32;
    if got[7][0].abs_diff(clamped) > unsure {
        return Err(format!("{what}: {} elements clamped, not {clamped}", got[7][0]));
    }
    let exacts = [&keys, &values, &keys, &values];
    let caches = [&cached[0], &cached[1], &want_cache[0], &want_cache[1]];
    for (n, (cache, exact)) in caches.into_iter().zip(exacts).enumerate() {
        let limit = f16::MAX.to_f64();
        let of = n % 2;
        for (i, got) in cache.iter().enumerate() {
            let (p, i) = (i / width, i % width);
            let same = got.to_bits() == before[of][p * width + i].to_bits();
            if p != position {
                if !same {
                    return Err(format!("{what}: position {p} of cache {n} was changed"));
                }
                continue;
            }
            let exact = exact[i].clamp(-limit, limit);
            let lost = if exact.abs() < HALF_LEAST { exact.abs() } else { 0.0 };
            let most = exact.abs() / 1024.0 + (-24.0f64).exp2() + offs[of][i] + lost;
            let off = (got.to_f64() - exact).abs();
            if off.is_nan() || off > most {
                return Err(format!("{what}: cache {n} has {got} at {i}, not {exact}"));
            }
        }
    }

    // The splits, computed with the row as the kernel rounded it.
    let queries = shape.queries(&qkv, head_norms, &own);
    let twins = want.clone();
    let in_order: Vec<u32> = (0..count).collect();
    shape.attend(position, &queries, &in_order, [&cached[0], &cached[1]], &mut want);
    // Only that row depends on the direction of rounding.
    let bits = |of: &[Vec<f16>; 2]| of.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let alike = bits(&cached) == bits(&want_cache);
    let reach = lengths(&shape, &queries);
    let got = floats(&got[6]);
    for head in 0..heads {
        for split in 0..splits.count {
            let at = shape.partial_at(head, split, splits.count);
            let of = [&queries, &reach].map(|of| &of[head * dim..][..dim]);
            let slack = slacks(&shape, &splits, split, of, |p| {
                let at = (p * kv_heads + head / (heads / kv_heads)) * dim;
                let row = |of: &[f16]| of[at..at + dim].iter().map(|x| x.to_f64()).collect();
                [row(&cached[0]), row(&cached[1])]
            });
            let [got, want, twins] = [&got, &want, &twins].map(|of| &of[at..at + dim + 4]);
            assert!(
                twins == want || (split + 1 == splits.count && !alike),
                "{what}: the twin's own"
            );
            if got[dim + 2..] != want[dim + 2..] {
                return Err(format!("{what}: the unused words of head {head} were written"));
            }
            compare(got, want, &slack, &format!("{what}: head {head}, split {split}"))?;
        }
    }
    Ok(())
}

/// Contexts around a tile's end, with more than one split and more than one tile per split.
const POSITIONS: [usize; 12] = [0, 1, 30, 31, 32, 62, 63, 64, 99, 641, 999, 2100];

/// Groups of 1, 2, 4, 7, 8 and 5; heads that are rotated in part, or not at all, of up to 16 lanes
/// and of more.
fn layers() -> [Layer; 12] {
    [
        layer((4, 4, 64, 32), false, None, 64),
        layer((8, 4, 128, 64), true, None, 64),
        layer((8, 2, 80, 16), false, Some(33), 3),
        layer((14, 2, 64, 32), true, Some(500), 64),
        layer((16, 2, 128, 64), false, None, 5),
        layer((5, 1, 256, 128), true, None, 64),
        layer((3, 3, 8, 4), true, Some(7), 64),
        layer((2, 1, 136, 12), false, None, 2),
        layer((7, 1, 96, 48), false, Some(1), 64),
        layer((4, 2, 192, 96), true, Some(64), 8),
        layer((8, 1, 120, 7), true, Some(65), 4),
        layer((6, 3, 256, 1), false, Some(300), 3),
    ]
}

/// Compares every layer at every position, in turns with caps on scores and loud keys.
fn all_layers(alone: &Alone<'_>, team: &str, random: &mut Random) {
    for (i, layer) in layers().iter().enumerate() {
        for (j, position) in POSITIONS.into_iter().enumerate() {
            let mut layer = Layer { loud: (i + j) % 5 == 0, ..*layer };
            layer.shape.softcap = [None, Some(5.0), Some(50.0)][(i + j) % 3];
            attention(alone, team, random, &layer, position).unwrap();
        }
    }
}

#[test]
fn attention_matches_its_twin_for_every_group_and_head_size() {
    let mut random = Random::new("decode_attention");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        all_layers(&alone, team, &mut random);
    }
}

/// A small layer of any shape that the kernel takes.
fn any_layer(random: &mut Random) -> Layer {
    let (kv_heads, shared_by) = (1 + random.below(3), 1 + random.below(9));
    let head_dim = 8 * (1 + random.below(32));
    let pairs = 1 + random.below(head_dim / 2);
    let window = (random.below(2) == 0).then(|| 1 + random.below(150));
    let heads = (kv_heads * shared_by, kv_heads, head_dim, pairs);
    let mut layer = layer(heads, random.below(2) == 0, window, 1 + random.below(9));
    layer.shape.softcap = [None, Some(3.0), Some(50.0)][random.below(3)];
    layer.loud = random.below(8) == 0;
    layer
}

#[test]
fn attention_of_any_shape_matches_its_twin() {
    let mut random = Random::new("decode_attention of any shape");
    let Some(device) = device(Reduction::Group) else { return };
    let (alone, shuffled) = (Alone::new(&device), Alone::with_all(&device, &SHUFFLES));
    for _ in 0..20 {
        for (alone, team) in [(&alone, "group"), (&shuffled, "subgroup")] {
            let (layer, position) = (any_layer(&mut random), random.below(200));
            attention(alone, team, &mut random, &layer, position).unwrap();
        }
    }
}

#[test]
fn attention_by_shuffles_matches_its_twin_where_they_are_emulated() {
    let mut random = Random::new("decode_attention by shuffles");
    let Some(device) = device(Reduction::Group) else { return };
    all_layers(&Alone::with_all(&device, &SHUFFLES), "subgroup", &mut random);
}

/// Makes the shuffles of decode_attention exchanges through workgroup memory, so that its text for
/// subgroups is tested on adapters that have none of 32.
const SHUFFLES: [Change; 5] = [
    (",\n        @builtin(subgroup_invocation_id) own: u32", ""),
    ("attend(group, local, own);", "me = local;\n    attend(group, local, local & 31u);"),
    ("subgroupShuffleXor(", "emulated_xor("),
    ("subgroupShuffle(", "emulated_at("),
    (
        "const LEAST",
        "var<private> me: u32;
        var<workgroup> exchanged: array<f32, 128>;
        fn emulated_at(v: f32, lane: u32) -> f32 {
            exchanged[me] = v;
            workgroupBarrier();
            let got = exchanged[(me & 0xe0u) | lane];
            workgroupBarrier();
            return got;
        }
        fn emulated_xor(v: f32, mask: u32) -> f32 {
            return emulated_at(v, (me & 31u) ^ mask);
        }
        const LEAST",
    ),
];

pub(super) fn combine(
    alone: &Alone<'_>,
    random: &mut Random,
    shape: &Attention,
    position: usize,
    sunk: bool,
) -> Check {
    let Attention { heads, head_dim: dim, window, splits_max, .. } = *shape;
    let count = Splits::of(position, window, splits_max).count;
    // Splits beyond the existing ones and unused words contain NaNs.
    let mut partial = vec![f32::NAN; heads * count * (dim + 4) + 4 * dim];
    for part in partial.chunks_exact_mut(dim + 4).take(heads * count) {
        part[..dim].fill_with(|| 20.0 * random.float());
        part[dim] = 8.0 * random.float();
        part[dim + 1] = 16.5 + 15.5 * random.float();
    }
    let width = heads * dim;
    let mut want = vec![0; packed_words(width)];
    let parts = &partial[..heads * count * (dim + 4)];
    let sinks: Vec<f32> = (0..heads).map(|_| 9.0 + 3.0 * random.float()).collect();
    match sunk {
        false => decode_combine(shape, position, parts, &mut want),
        true => decode_combine_sinks(shape, position, parts, &sinks, &mut want),
    }
    let p = params::Combine {
        heads: heads as u32,
        head_dim: dim as u32,
        window: window.unwrap_or(0) as u32,
        splits_max: splits_max as u32,
        pieces: pieces(width) as u32,
    };
    let mut buffers = vec![words(&partial), vec![0x7fc0_0000; want.len()]];
    buffers.extend(sunk.then(|| words(&sinks)));
    let grid = (width.div_ceil(64) as u32, 1);
    let name = if sunk { "decode_combine_sinks" } else { "decode_combine" };
    let got = alone.run(name, position, &p, &buffers, grid);
    // A split's weight passes an exponential at each step (off by 3 + 2 |x| units, its argument by one), a product and a sum;
    // the sums of four are two steps more. Then the division.
    let roundings = 7.0 * (count.div_ceil(16) + 2) as f64 + 2.5;
    let mut slack = Vec::new();
    for (head, sink) in partial.chunks_exact(count * (dim + 4)).take(heads).zip(sinks) {
        let sink = if sunk { sink } else { f32::NEG_INFINITY };
        let parts = || head.chunks_exact(dim + 4);
        let most = parts().fold(sink, |most, part| most.max(part[dim]));
        let weigh = |part: &[f32]| {
            let below = f64::from(most) - f64::from(part[dim]);
            ((-below).exp(), (roundings + 3.0 * below) * EPS)
        };
        let total: f64 = parts().map(|part| weigh(part).0 * f64::from(part[dim + 1])).sum();
        let below = f64::from(most) - f64::from(sink);
        let alone = if sunk { (-below).exp() } else { 0.0 };
        let total = total + alone;
        for i in 0..dim {
            let value: f64 = parts().map(|part| weigh(part).0 * f64::from(part[i])).sum();
            let off = parts().map(|part| {
                let (weight, off) = weigh(part);
                let of_total = (value / total).abs() * f64::from(part[dim + 1]);
                weight * off * (f64::from(part[i].abs()) + of_total)
            });
            let sink_off = if sunk { alone * (roundings + 3.0 * below) * EPS } else { 0.0 };
            slack.push((off.sum::<f64>() + sink_off * (value / total).abs()) / total);
        }
    }
    compare_packed(&got[1], &want, &slack, &format!("{shape:?} at {position}"))
}

#[test]
fn splits_are_put_together_as_their_twin_does() {
    let mut random = Random::new("decode_combine");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for (heads, head_dim, window, splits_max) in
        [(1, 8, None, 64), (7, 80, None, 128), (5, 136, Some(700), 64), (3, 256, None, 3)]
    {
        let shape = layer((heads, 1, head_dim, 4), false, window, splits_max).shape;
        for position in POSITIONS.into_iter().chain([511, 512, 2047, 5000]) {
            for sunk in [false, true] {
                combine(&alone, &mut random, &shape, position, sunk).unwrap();
            }
        }
    }
}
