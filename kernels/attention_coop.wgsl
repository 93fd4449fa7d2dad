// attention.wgsl for many tokens on cooperative matrices, over an f16 cache: a workgroup multiplies
// QUERIES queries that read one kv head with POSITIONS positions at a time, a subgroup a quarter of
// them. It goes through the positions twice: for each query's highest score, and for the sum of
// values, which then never has to be rescaled. Queries (scaled by row, kept in registers) and
// weights are each the sum of two f16, so that little precision is lost beyond that of the cache.
// The next keys and values are fetched before the present ones are used. head_dim is a multiple of
// 4, at most HEAD_MAX.
// Grid: x by queries, y by kv head.
//!needs coopmat f16
//!for shape in 8 16
//!include shared/step.wgsl
//!include shared/attention_params.wgsl
//!include shared/softcap.wgsl
//!include shared/blocks.wgsl
//!include shared/coop_{shape}.wgsl

@group(1) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> keys: array<vec4<f16>>;
@group(1) @binding(2) var<storage, read> values: array<vec4<f16>>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

const LEAST: f32 = -3.0e38;
// The weight of a query's highest score. It is so large that the lower parts of weights are normal
// f16.
const WHOLE: f32 = 16384.0;
const THREADS: u32 = 4u * LANES;
const QUERIES: u32 = 4u * BLOCK;
const POSITIONS: u32 = 2u * BLOCK;
const HEAD_MAX: u32 = 8u * BLOCK;
const HEAD_QUADS: u32 = HEAD_MAX / 4u;
// vec4s from one row to the next. The extra ones keep rows in different banks.
const STRIDE: u32 = HEAD_QUADS + 2u;
const WEIGHT_STRIDE: u32 = POSITIONS / 4u + 2u;
const SCORE_STRIDE: u32 = POSITIONS + 4u;
// Invocations of one query, and the positions that each handles.
const PARTS: u32 = THREADS / QUERIES;
const EACH: u32 = POSITIONS / PARTS;
// Positions that the workgroup fetches in one of eight turns.
const TURN: u32 = THREADS / HEAD_QUADS;
// Quads of a block.
const QUADS: u32 = BLOCK / 4u;

// [query][dimension] at first, then [position][dimension] of keys, and behind them of values.
var<workgroup> cached: array<vec4<f16>, QUERIES * STRIDE>;
// [query][position] of scores and of weights in two parts.
var<workgroup> scores: array<f32, QUERIES * SCORE_STRIDE>;
var<workgroup> weights: array<vec4<f16>, QUERIES * WEIGHT_STRIDE>;
var<workgroup> weights_low: array<vec4<f16>, QUERIES * WEIGHT_STRIDE>;
var<workgroup> partial: array<f32, THREADS>;

// The tile: its kv head, and the end of the positions that it sees.
var<private> kv_head: u32;
var<private> end: u32;
// This invocation's query: its position, and the factor that restores the scale of its scores.
var<private> at: u32;
var<private> scale: f32;

// The upper 11 bits, which an f16 holds exactly. Masked, because a compiler may drop a conversion
// from f32 to f16 and back.
fn upper(v: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) & vec4<u32>(0xffffe000u));
}

// The number of heads that read one kv head. Queries are numbered token by token, then head by
// head.
fn sharing() -> u32 {
    return params.heads / params.kv_heads;
}

fn query_at(row: u32, stride: u32) -> u32 {
    let head = kv_head * sharing() + row % sharing();
    return (row / sharing()) * stride + head * params.head_dim;
}

// The index in the cache of this invocation's vec4 at a position. Past the end the cache may
// contain anything, even NaN, so the last position is taken again, with weight 0.
fn cache_at(span: Span, position: u32, quad: u32) -> u32 {
    let row = row_of(span, min(position, end - 1u));
    return (row * params.kv_heads + kv_head) * (params.head_dim / 4u) + quad;
}

// This invocation's quad of the query, scaled, which must be one of the tile's.
fn query(mine: u32, rows: u32, quad: u32, factor: f32) -> vec4<f32> {
    if (mine < rows && quad * 4u < params.head_dim) {
        return q[query_at(mine, params.q_stride) / 4u + quad] * factor;
    }
    return vec4<f32>(0.0);
}

// The score of this invocation's query at the i-th of its positions; LEAST if it does not see it.
fn seen(start: u32, i: u32, local: u32) -> f32 {
    let p = (local % PARTS) * EACH + i;
    let position = start + p;
    let visible = position <= at && (params.window == 0u || position + params.window > at);
    let score = scores[(local / PARTS) * SCORE_STRIDE + p] * scale;
    return select(LEAST, softcapped(score, params.softcap), visible);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    kv_head = group.y;
    let first = group.x * QUERIES;
    let rows = now.tokens * sharing();
    if (first >= rows) {
        return;
    }
    end = now.position + (min(first + QUERIES, rows) - 1u) / sharing() + 1u;
    let sees = now.position + first / sharing() + 1u;
    let begin = select(0u, sees - min(params.window, sees), params.window > 0u);
    let subgroup = local / LANES;
    // More than half of HEAD_MAX.
    let wide = params.head_dim > HEAD_MAX / 2u;

    // The queries in f16, each scaled by a power of two to 2^14 .. 2^15, as in halve.wgsl.
    let mine = first + local / PARTS;
    at = now.position + mine / sharing();
    var largest = vec4<f32>(0.0);
    for (var quad = local % PARTS; quad < HEAD_QUADS; quad += PARTS) {
        largest = max(largest, abs(query(mine, rows, quad, 1.0)));
    }
    partial[local] = max(max(largest.x, largest.y), max(largest.z, largest.w));
    workgroupBarrier();
    var most = 0.0;
    for (var i = 0u; i < PARTS; i++) {
        most = max(most, partial[(local / PARTS) * PARTS + i]);
    }
    let exponent = clamp(bitcast<u32>(most) >> 23u, 15u, 254u);
    let factor = bitcast<f32>((268u - exponent) << 23u);
    scale = params.scale * bitcast<f32>((exponent - 14u) << 23u);
    for (var quad = local % PARTS; quad < HEAD_QUADS; quad += PARTS) {
        cached[(local / PARTS) * STRIDE + quad] = vec4<f16>(upper(query(mine, rows, quad, factor)));
    }
    workgroupBarrier();
    let own = subgroup * BLOCK * STRIDE;
//!repeat d in 8
    let high{d} = coopLoadT<Weights>(&cached[own + {d}u * QUADS], STRIDE);
//!end
    workgroupBarrier();
    for (var quad = local % PARTS; quad < HEAD_QUADS; quad += PARTS) {
        let v = query(mine, rows, quad, factor);
        cached[(local / PARTS) * STRIDE + quad] = vec4<f16>(v - upper(v));
    }
    workgroupBarrier();
//!repeat d in 8
    let low{d} = coopLoadT<Weights>(&cached[own + {d}u * QUADS], STRIDE);
//!end

    let score_at = subgroup * BLOCK * SCORE_STRIDE;
    let live = (local % HEAD_QUADS) * 4u < params.head_dim;
    let quad = min(local % HEAD_QUADS, params.head_dim / 4u - 1u);
    let turn = local / HEAD_QUADS;
    let to = turn * STRIDE + local % HEAD_QUADS;
    let none = vec4<f16>();

    var highest = LEAST;
    var span = span_at(begin);
//!repeat i in 8
    var k{i} = keys[cache_at(span, begin + turn + {i}u * TURN, quad)];
//!end
    for (var start = begin; start < end; start += POSITIONS) {
        workgroupBarrier();
//!repeat i in 8
        cached[to + {i}u * TURN * STRIDE] = select(none, k{i}, live);
//!end
        workgroupBarrier();
        let next = min(start + POSITIONS, end - 1u);
        span = span_at(next);
//!repeat i in 8
        k{i} = keys[cache_at(span, next + turn + {i}u * TURN, quad)];
//!end
        {
            var sums0: Outputs;
            var sums1: Outputs;
//!repeat d in 4
            let a{d} = coopLoad<Inputs>(&cached[{d}u * QUADS], STRIDE);
            let b{d} = coopLoad<Inputs>(&cached[BLOCK * STRIDE + {d}u * QUADS], STRIDE);
            sums0 = coopMultiplyAdd(high{d}, a{d}, sums0);
            sums1 = coopMultiplyAdd(high{d}, b{d}, sums1);
            sums0 = coopMultiplyAdd(low{d}, a{d}, sums0);
            sums1 = coopMultiplyAdd(low{d}, b{d}, sums1);
//!end
            if (wide) {
//!repeat d in 4..8
                let a{d} = coopLoad<Inputs>(&cached[{d}u * QUADS], STRIDE);
                let b{d} = coopLoad<Inputs>(&cached[BLOCK * STRIDE + {d}u * QUADS], STRIDE);
                sums0 = coopMultiplyAdd(high{d}, a{d}, sums0);
                sums1 = coopMultiplyAdd(high{d}, b{d}, sums1);
                sums0 = coopMultiplyAdd(low{d}, a{d}, sums0);
                sums1 = coopMultiplyAdd(low{d}, b{d}, sums1);
//!end
            }
            coopStoreT(sums0, &scores[score_at], SCORE_STRIDE);
            coopStoreT(sums1, &scores[score_at + BLOCK], SCORE_STRIDE);
        }
        workgroupBarrier();
        for (var i = 0u; i < EACH; i++) {
            highest = max(highest, seen(start, i, local));
        }
    }
    partial[local] = highest;
    workgroupBarrier();
    for (var i = 0u; i < PARTS; i++) {
        highest = max(highest, partial[(local / PARTS) * PARTS + i]);
    }

    let weight_at = subgroup * BLOCK * WEIGHT_STRIDE;
    var total = 0.0;
//!repeat d in 8
    var out{d}: Outputs;
//!end
    span = span_at(begin);
//!repeat i in 8
    k{i} = keys[cache_at(span, begin + turn + {i}u * TURN, quad)];
    var v{i} = values[cache_at(span, begin + turn + {i}u * TURN, quad)];
//!end
    for (var start = begin; start < end; start += POSITIONS) {
        workgroupBarrier();
//!repeat i in 8
        cached[to + {i}u * TURN * STRIDE] = select(none, k{i}, live);
        cached[to + (POSITIONS + {i}u * TURN) * STRIDE] = select(none, v{i}, live);
//!end
        workgroupBarrier();
        let next = min(start + POSITIONS, end - 1u);
        span = span_at(next);
//!repeat i in 8
        k{i} = keys[cache_at(span, next + turn + {i}u * TURN, quad)];
        v{i} = values[cache_at(span, next + turn + {i}u * TURN, quad)];
//!end
        {
            var sums0: Outputs;
            var sums1: Outputs;
//!repeat d in 4
            let a{d} = coopLoad<Inputs>(&cached[{d}u * QUADS], STRIDE);
            let b{d} = coopLoad<Inputs>(&cached[BLOCK * STRIDE + {d}u * QUADS], STRIDE);
            sums0 = coopMultiplyAdd(high{d}, a{d}, sums0);
            sums1 = coopMultiplyAdd(high{d}, b{d}, sums1);
            sums0 = coopMultiplyAdd(low{d}, a{d}, sums0);
            sums1 = coopMultiplyAdd(low{d}, b{d}, sums1);
//!end
            if (wide) {
//!repeat d in 4..8
                let a{d} = coopLoad<Inputs>(&cached[{d}u * QUADS], STRIDE);
                let b{d} = coopLoad<Inputs>(&cached[BLOCK * STRIDE + {d}u * QUADS], STRIDE);
                sums0 = coopMultiplyAdd(high{d}, a{d}, sums0);
                sums1 = coopMultiplyAdd(high{d}, b{d}, sums1);
                sums0 = coopMultiplyAdd(low{d}, a{d}, sums0);
                sums1 = coopMultiplyAdd(low{d}, b{d}, sums1);
//!end
            }
            coopStoreT(sums0, &scores[score_at], SCORE_STRIDE);
            coopStoreT(sums1, &scores[score_at + BLOCK], SCORE_STRIDE);
        }
        workgroupBarrier();
        for (var i = 0u; i < EACH; i += 4u) {
            let s = vec4<f32>(seen(start, i, local), seen(start, i + 1u, local),
                seen(start, i + 2u, local), seen(start, i + 3u, local));
            // If a query sees no position here, its highest score is LEAST, too.
            let weight = WHOLE * select(exp(s - highest), vec4<f32>(0.0), s <= vec4<f32>(LEAST));
            let to = (local / PARTS) * WEIGHT_STRIDE + ((local % PARTS) * EACH + i) / 4u;
            let high = upper(weight);
            weights[to] = vec4<f16>(high);
            weights_low[to] = vec4<f16>(weight - high);
            total += dot(weight, vec4<f32>(1.0));
        }
        workgroupBarrier();
//!repeat p in 2
        {
            let high = coopLoadT<Weights>(&weights[weight_at + {p}u * QUADS], WEIGHT_STRIDE);
            let low = coopLoadT<Weights>(&weights_low[weight_at + {p}u * QUADS], WEIGHT_STRIDE);
//!repeat d in 4
            let b{d} = coopLoadT<Inputs>(&cached[(POSITIONS + {p}u * BLOCK) * STRIDE + {d}u * QUADS], STRIDE);
            out{d} = coopMultiplyAdd(high, b{d}, out{d});
            out{d} = coopMultiplyAdd(low, b{d}, out{d});
//!end
            if (wide) {
//!repeat d in 4..8
                let b{d} = coopLoadT<Inputs>(&cached[(POSITIONS + {p}u * BLOCK) * STRIDE + {d}u * QUADS], STRIDE);
                out{d} = coopMultiplyAdd(high, b{d}, out{d});
                out{d} = coopMultiplyAdd(low, b{d}, out{d});
//!end
            }
        }
//!end
    }
    partial[local] = total;
    workgroupBarrier();
//!repeat d in 8
    coopStoreT(out{d}, &scores[score_at], SCORE_STRIDE);
    workgroupBarrier();
    for (var e = local % LANES; e < BLOCK * BLOCK; e += LANES) {
        let row = subgroup * BLOCK + e / BLOCK;
        let d = {d}u * BLOCK + e % BLOCK;
        if (first + row < rows && d < params.head_dim) {
            var whole = 0.0;
            for (var i = 0u; i < PARTS; i++) {
                whole += partial[row * PARTS + i];
            }
            let source = score_at + (e / BLOCK) * SCORE_STRIDE + e % BLOCK;
            result[query_at(first + row, params.result_stride) + d] = scores[source] / whole;
        }
    }
    workgroupBarrier();
//!end
}
