// One token's attention, from its queries, keys and values. Queries and the new key are normalised
// (if asked) and rotated by the position; the new key and value are written to the cache as f16.
// Then follows, over one split of the positions and for up to four query heads of one key head, a
// running softmax over tiles of 32 (flash decoding: Dao et al., 2023). A head's result is its
// weighted values, the highest score and the sum of weights; decode_combine combines the splits.
// Grid: a workgroup for each (key head, four of its query heads, split).
// head_dim is a multiple of 8, at most 256.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/splits.wgsl
//!include shared/blocks.wgsl
//!include shared/softcap.wgsl
//!include shared/team_{team}.wgsl

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Pairs that are rotated: (i, i + pairs).
    pairs: u32,
    // Positions that the token sees, including its own; 0 for all.
    window: u32,
    splits_max: u32,
    // 1 to use the norm weights.
    normed: u32,
    eps: f32,
    scale: f32,
    // Scores are capped to it; 0 for no cap.
    softcap: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
// Queries, keys and values one after the other.
@group(1) @binding(0) var<storage, read> qkv: array<f32>;
@group(1) @binding(1) var<storage, read> q_norm: array<f32>;
@group(1) @binding(2) var<storage, read> k_norm: array<f32>;
// (cos, sin) by position and pair.
@group(1) @binding(3) var<storage, read> rope_table: array<vec2<f32>>;
@group(1) @binding(4) var<storage, read_write> keys: array<vec4<u32>>;
@group(1) @binding(5) var<storage, read_write> values: array<vec4<u32>>;
// By head and split: head_dim values, the highest score, the sum of weights, two unused.
@group(1) @binding(6) var<storage, read_write> partial: array<vec2<f32>>;

// The number of elements clamped in the cache, then the sequence's blocks.
struct Blocks { clamped: atomic<u32>, at: array<u32> }

@group(1) @binding(7) var<storage, read_write> cache_blocks: Blocks;

const LEAST: f32 = -3.0e38;
const HALF_MAX: f32 = 65504.0;
// vec4s of f16s from one row of the tile to the next. One is padding to spread the banks.
const ROW: u32 = 17u;

var<workgroup> query: array<vec4<f32>, 256>;
// The new key.
var<workgroup> fresh: array<f32, 256>;
// Up to 128 dimensions of the tile's keys, then of its values. Before that, the rotations of
// this position (x, y) and the norm weights of queries and keys (z, w).
var<workgroup> tile: array<vec4<u32>, 544>;
var<workgroup> weights: array<f32, 128>;
var<workgroup> shrink: array<f32, 4>;

fn half_pair(a: f32, b: f32) -> u32 {
    return pack2x16float(clamp(vec2<f32>(a, b), vec2<f32>(-HALF_MAX), vec2<f32>(HALF_MAX)));
}

// Eight dimensions of the new key and value, in the cache's format.
fn new_key(column: u32) -> vec4<u32> {
    let i = 8u * column;
    return vec4<u32>(half_pair(fresh[i], fresh[i + 1u]), half_pair(fresh[i + 2u], fresh[i + 3u]),
        half_pair(fresh[i + 4u], fresh[i + 5u]), half_pair(fresh[i + 6u], fresh[i + 7u]));
}

fn new_value(kv_head: u32, column: u32) -> vec4<u32> {
    let i = (params.heads + params.kv_heads + kv_head) * params.head_dim + 8u * column;
    return vec4<u32>(half_pair(qkv[i], qkv[i + 1u]), half_pair(qkv[i + 2u], qkv[i + 3u]),
        half_pair(qkv[i + 4u], qkv[i + 5u]), half_pair(qkv[i + 6u], qkv[i + 7u]));
}

// Whether one of eight f16s has the greatest magnitude, as a clamped value has.
fn brimful(v: vec4<u32>) -> bool {
    let low = (v & vec4<u32>(0x7fffu)) == vec4<u32>(0x7bffu);
    let high = (v & vec4<u32>(0x7fff0000u)) == vec4<u32>(0x7bff0000u);
    return any(low | high);
}

// How many of eight dimensions of the new key and value must be clamped for the cache.
fn beyond(kv_head: u32, column: u32) -> u32 {
    let i = 8u * column;
    let v = (params.heads + params.kv_heads + kv_head) * params.head_dim + i;
    var count = 0u;
    for (var j = 0u; j < 8u; j++) {
        count += select(0u, 1u, abs(fresh[i + j]) > HALF_MAX)
            + select(0u, 1u, abs(qkv[v + j]) > HALF_MAX);
    }
    return count;
}

// The blocks of the tile from `start`. Without a window, tiles begin at multiples of TILE, and no
// tile lies in two blocks.
fn blocks_of(start: u32) -> Span {
    if (params.window == 0u) {
        return span_within(start);
    }
    return span_at(start);
}

// Eight dimensions of the key at `position`; zero past the end of the tile or the head.
fn key_at(span: Span, position: u32, end: u32, kv_head: u32, column: u32) -> vec4<u32> {
    if (position >= end || column >= params.head_dim / 8u) {
        return vec4<u32>(0u);
    }
    if (position == now.position) {
        return new_key(column);
    }
    return keys[(row_of(span, position) * params.kv_heads + kv_head) * (params.head_dim / 8u) + column];
}

fn value_at(span: Span, position: u32, end: u32, kv_head: u32, column: u32) -> vec4<u32> {
    if (position >= end || column >= params.head_dim / 8u) {
        return vec4<u32>(0u);
    }
    if (position == now.position) {
        return new_value(kv_head, column);
    }
    return values[(row_of(span, position) * params.kv_heads + kv_head) * (params.head_dim / 8u) + column];
}

// A pair of dimensions, rotated by the position.
fn rotated(i: u32, a: f32, b: f32) -> vec2<f32> {
    let rotation = bitcast<vec4<f32>>(tile[i]).xy;
    return vec2<f32>(a * rotation.x - b * rotation.y, b * rotation.x + a * rotation.y);
}

// The norm weights of a dimension of queries and of keys.
fn weight_of(i: u32) -> vec2<f32> {
    return bitcast<vec4<f32>>(tile[i]).zw;
}

// The reciprocal root of the mean square over the whole team, or 1 without a norm.
fn inverse_of(square: f32, local: u32) -> f32 {
    let sum = sum32(square, local);
    return select(1.0, inverseSqrt(sum / f32(params.head_dim) + params.eps), params.normed == 1u);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let splits = splits_of(params.window, params.splits_max);
    let shared_by = params.heads / params.kv_heads;
    let fours = (shared_by + 3u) / 4u;
    let split = group.x % splits.count;
    let four = group.x / splits.count % fours;
    let kv_head = group.x / splits.count / fours;
    let dim = min(params.head_dim, 256u);
    let team = local / 32u;
    let lane = local & 31u;
    // The team's head. A head past the last one of this key head counts as zeros.
    let real = 4u * four + team < shared_by;
    let head = kv_head * shared_by + min(4u * four + team, shared_by - 1u);

    // Loaded before anything waits.
    let own = row_of(span_within(now.position), now.position);
    var next = blocks_of(splits.first + split * splits.tiles_each * TILE);
    let rotation = rope_table[now.position * params.pairs + local];
    let first_weight = vec2<f32>(q_norm[local], k_norm[local]);
    let second_weight = vec2<f32>(q_norm[local + 128u], k_norm[local + 128u]);
    var square = 0.0;
    for (var i = lane; i < dim; i += 32u) {
        let v = qkv[head * dim + i];
        square += v * v;
    }
    let inverse = inverse_of(square, local) * select(0.0, params.scale, real);
    let plain = params.normed == 0u;
    tile[local] = bitcast<vec4<u32>>(vec4<f32>(rotation, select(first_weight, vec2<f32>(1.0), plain)));
    tile[local + 128u] = bitcast<vec4<u32>>(vec4<f32>(rotation, select(second_weight, vec2<f32>(1.0), plain)));
    workgroupBarrier();
    for (var i = lane; i < dim; i += 32u) {
        query[(team * dim + i) / 4u][i % 4u] = qkv[head * dim + i] * inverse * weight_of(i).x;
    }
    let owner = split + 1u == splits.count;
    if (owner) {
        let at = (params.heads + kv_head) * dim;
        var square = 0.0;
        for (var i = lane; i < dim; i += 32u) {
            square += qkv[at + i] * qkv[at + i];
        }
        let inverse = inverse_of(square, local);
        for (var i = local; i < dim; i += 128u) {
            fresh[i] = qkv[at + i] * inverse * weight_of(i).y;
        }
    }
    workgroupBarrier();
    for (var i = lane; i < params.pairs; i += 32u) {
        let a = team * dim + i;
        let b = a + params.pairs;
        let pair = rotated(i, query[a / 4u][a % 4u], query[b / 4u][b % 4u]);
        query[a / 4u][a % 4u] = pair.x;
        query[b / 4u][b % 4u] = pair.y;
    }
    if (owner) {
        for (var i = local; i < params.pairs; i += 128u) {
            let pair = rotated(i, fresh[i], fresh[i + params.pairs]);
            fresh[i] = pair.x;
            fresh[i + params.pairs] = pair.y;
        }
    }
    workgroupBarrier();
    let words = dim / 8u;
    if (owner && four == 0u && local < words) {
        let to = (own * params.kv_heads + kv_head) * words + local;
        let key = new_key(local);
        let value = new_value(kv_head, local);
        keys[to] = key;
        values[to] = value;
        if (brimful(key) || brimful(value)) {
            atomicAdd(&cache_blocks.clamped, beyond(kv_head, local));
        }
    }

    // The part of a tile that this invocation loads: a column of eight dimensions, of every eighth
    // row.
    let column = local % 16u;
    let row = local / 16u;
    // The part of the values that it sums: two dimensions of a head (x, y) and of the second next
    // head (z, w).
    let pair = local % 64u;
    let first = local / 64u;
    let chunks = (words + 15u) / 16u;
    var most = LEAST;
    var total = 0.0;
    var low = vec4<f32>(0.0);
    var high = vec4<f32>(0.0);
    for (var n = 0u; n < splits.tiles_each; n++) {
        let start = splits.first + (split * splits.tiles_each + n) * TILE;
        if (start >= splits.end) {
            break;
        }
        let at = start + row;
        let end = min(splits.end, start + TILE);
        let span = next;
        next = blocks_of(start + TILE);
        // The first values are in flight while the scores are computed.
        let v0 = value_at(span, at, end, kv_head, column);
        let v1 = value_at(span, at + 8u, end, kv_head, column);
        let v2 = value_at(span, at + 16u, end, kv_head, column);
        let v3 = value_at(span, at + 24u, end, kv_head, column);
        var score = 0.0;
        for (var c = 0u; c < chunks; c++) {
            let which = c * 16u + column;
            let k0 = key_at(span, at, end, kv_head, which);
            let k1 = key_at(span, at + 8u, end, kv_head, which);
            let k2 = key_at(span, at + 16u, end, kv_head, which);
            let k3 = key_at(span, at + 24u, end, kv_head, which);
            let to = row * ROW + column;
            tile[to] = k0;
            tile[to + 8u * ROW] = k1;
            tile[to + 16u * ROW] = k2;
            tile[to + 24u * ROW] = k3;
            workgroupBarrier();
            let columns = min(words - c * 16u, 16u);
            let quads = (team * dim) / 4u + c * 32u;
            for (var d = 0u; d < columns; d++) {
                let k = tile[lane * ROW + d];
                score += dot(vec4<f32>(unpack2x16float(k.x), unpack2x16float(k.y)), query[quads + 2u * d])
                    + dot(vec4<f32>(unpack2x16float(k.z), unpack2x16float(k.w)), query[quads + 2u * d + 1u]);
            }
            workgroupBarrier();
        }
        let there = start + lane < end;
        score = softcapped(score, params.softcap);
        let highest = max(most, max32(select(LEAST, score, there), local));
        let weight = select(0.0, exp(score - highest), there);
        let less = exp(most - highest);
        total = total * less + sum32(weight, local);
        most = highest;
        weights[local] = weight;
        if (lane == 0u) {
            shrink[team] = less;
        }
        for (var c = 0u; c < chunks; c++) {
            let to = row * ROW + column;
            if (c == 0u) {
                tile[to] = v0;
                tile[to + 8u * ROW] = v1;
                tile[to + 16u * ROW] = v2;
                tile[to + 24u * ROW] = v3;
            } else {
                let which = c * 16u + column;
                tile[to] = value_at(span, at, end, kv_head, which);
                tile[to + 8u * ROW] = value_at(span, at + 8u, end, kv_head, which);
                tile[to + 16u * ROW] = value_at(span, at + 16u, end, kv_head, which);
                tile[to + 24u * ROW] = value_at(span, at + 24u, end, kv_head, which);
            }
            workgroupBarrier();
            var sums = select(high, low, c == 0u)
                * vec4<f32>(vec2<f32>(shrink[first]), vec2<f32>(shrink[first + 2u]));
            for (var j = 0u; j < TILE; j++) {
                let v = unpack2x16float(tile[j * ROW + pair / 4u][pair % 4u]);
                sums += vec4<f32>(v * weights[first * 32u + j], v * weights[first * 32u + 64u + j]);
            }
            if (c == 0u) {
                low = sums;
            } else {
                high = sums;
            }
            workgroupBarrier();
        }
    }
    let stride = dim / 2u + 2u;
    for (var c = 0u; c < chunks; c++) {
        let sums = select(high, low, c == 0u);
        let at = c * 64u + pair;
        if (at < dim / 2u) {
            if (4u * four + first < shared_by) {
                partial[((kv_head * shared_by + 4u * four + first) * splits.count + split) * stride + at] = sums.xy;
            }
            if (4u * four + first + 2u < shared_by) {
                partial[((kv_head * shared_by + 4u * four + first + 2u) * splits.count + split) * stride + at] = sums.zw;
            }
        }
    }
    if (lane == 0u && real) {
        partial[(head * splits.count + split) * stride + dim / 2u] = vec2<f32>(most, total);
    }
}
