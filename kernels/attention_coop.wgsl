// attention.wgsl for many tokens on cooperative matrices, over an f16 cache: a workgroup multiplies
// QUERIES queries that read one kv head with POSITIONS positions at a time. It goes through the
// positions twice: for each query's highest score, and for the sum of values, which then never has
// to be rescaled. Queries (scaled by row) and weights are each the sum of two f16, so that little
// precision is lost beyond that of the cache. head_dim is a multiple of 4, at most HEAD_MAX.
// Grid: x by queries, y by kv head.
//!needs coopmat f16
//!for shape in 8x64 16x64
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
const QUERIES: u32 = 2u * BLOCK;
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

// [query][dimension] in two parts, [position][dimension] of keys or of values,
// [query][position] of scores and of weights in two parts.
var<workgroup> queries: array<vec4<f16>, QUERIES * STRIDE>;
var<workgroup> queries_low: array<vec4<f16>, QUERIES * STRIDE>;
var<workgroup> cached: array<vec4<f16>, POSITIONS * STRIDE>;
var<workgroup> scores: array<f32, QUERIES * SCORE_STRIDE>;
var<workgroup> weights: array<vec4<f16>, QUERIES * WEIGHT_STRIDE>;
var<workgroup> weights_low: array<vec4<f16>, QUERIES * WEIGHT_STRIDE>;
var<workgroup> partial: array<f32, THREADS>;

// The tile: its kv head, its first query, and the end of the positions that it sees.
var<private> kv_head: u32;
var<private> first: u32;
var<private> end: u32;
// The blocks of the current positions.
var<private> span: Span;
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

// The index in the cache of the vec4 `quad` at a position.
fn cache_at(position: u32, quad: u32) -> u32 {
    return (row_of(span, position) * params.kv_heads + kv_head) * (params.head_dim / 4u) + quad;
}

fn live(position: u32, quad: u32) -> bool {
    return position < end && quad * 4u < params.head_dim;
}

// Blocks of dimensions in use.
fn blocks() -> u32 {
    return min((params.head_dim + BLOCK - 1u) / BLOCK, 8u);
}

// Writes the products of the tile's queries and the keys from `start` on to `scores`, and their
// blocks to `span`. Must be reached by the whole workgroup.
fn score(start: u32, local: u32) {
    span = span_at(start);
    workgroupBarrier();
    for (var e = local; e < POSITIONS * HEAD_QUADS; e += THREADS) {
        let position = e / HEAD_QUADS;
        let quad = e % HEAD_QUADS;
        var v = vec4<f16>();
        if (live(start + position, quad)) {
            v = keys[cache_at(start + position, quad)];
        }
        cached[position * STRIDE + quad] = v;
    }
    workgroupBarrier();
    let subgroup = local / LANES;
    let row = (subgroup % 2u) * BLOCK;
    let position = (subgroup / 2u) * BLOCK;
    var sums: Outputs;
    for (var block = 0u; block < blocks(); block++) {
        let d = block * (BLOCK / 4u);
        let a = coopLoadT<Weights>(&queries[row * STRIDE + d], STRIDE);
        let b = coopLoad<Inputs>(&cached[position * STRIDE + d], STRIDE);
        sums = coopMultiplyAdd(a, b, sums);
        let low = coopLoadT<Weights>(&queries_low[row * STRIDE + d], STRIDE);
        sums = coopMultiplyAdd(low, b, sums);
    }
    coopStoreT(sums, &scores[row * SCORE_STRIDE + position], SCORE_STRIDE);
    workgroupBarrier();
}

// The score of this invocation's query at the i-th of its positions; LEAST if it does not see it.
fn seen(start: u32, i: u32, local: u32) -> f32 {
    let p = (local % PARTS) * EACH + i;
    let position = start + p;
    let visible = position <= at && (params.window == 0u || position + params.window > at);
    let score = scores[(local / PARTS) * SCORE_STRIDE + p] * scale;
    return select(LEAST, softcapped(score, params.softcap), visible);
}

fn finish(sums: Outputs, block: u32, local: u32) {
    let subgroup = local / LANES;
    let from_e = subgroup * BLOCK * BLOCK;
    workgroupBarrier();
    coopStoreT(sums, &scores[from_e], BLOCK);
    workgroupBarrier();
    for (var e = local % LANES; e < BLOCK * BLOCK; e += LANES) {
        let row = (subgroup % 2u) * BLOCK + e / BLOCK;
        let d = (subgroup / 2u + 2u * block) * BLOCK + e % BLOCK;
        if (first + row < now.tokens * sharing() && d < params.head_dim) {
            var total = 0.0;
            for (var i = 0u; i < PARTS; i++) {
                total += partial[row * PARTS + i];
            }
            result[query_at(first + row, params.result_stride) + d] = scores[from_e + e] / total;
        }
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    kv_head = group.y;
    first = group.x * QUERIES;
    let rows = now.tokens * sharing();
    let stop = min(now.position + (min(group.x * QUERIES + QUERIES, rows) - 1u) / sharing() + 1u,
        arrayLength(&keys));
    end = stop;
    let sees = now.position + group.x * QUERIES / sharing() + 1u;
    let begin = select(0u, sees - min(params.window, sees), params.window > 0u);

    // The queries in f16, each scaled by a power of two to 2^14 .. 2^15, as in halve.wgsl.
    let mine = first + local / PARTS;
    at = now.position + mine / sharing();
    var largest = vec4<f32>(0.0);
    for (var quad = local % PARTS; quad * 4u < params.head_dim; quad += PARTS) {
        if (mine < rows) {
            largest = max(largest, abs(q[query_at(mine, params.q_stride) / 4u + quad]));
        }
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
        var v = vec4<f32>(0.0);
        if (mine < rows && quad * 4u < params.head_dim) {
            v = q[query_at(mine, params.q_stride) / 4u + quad] * factor;
        }
        let high = upper(v);
        queries[(local / PARTS) * STRIDE + quad] = vec4<f16>(high);
        queries_low[(local / PARTS) * STRIDE + quad] = vec4<f16>(v - high);
    }

    var highest = LEAST;
    for (var start = begin; start < stop; start += POSITIONS) {
        score(start, local);
        for (var i = 0u; i < EACH; i++) {
            highest = max(highest, seen(start, i, local));
        }
    }
    partial[local] = highest;
    workgroupBarrier();
    for (var i = 0u; i < PARTS; i++) {
        highest = max(highest, partial[(local / PARTS) * PARTS + i]);
    }

    let subgroup = local / LANES;
    let row = (subgroup % 2u) * BLOCK;
    // Every second block of dimensions, starting with the first or the second.
    let d = (subgroup / 2u) * (BLOCK / 4u);
    var total = 0.0;
    var sums0: Outputs;
    var sums1: Outputs;
    var sums2: Outputs;
    var sums3: Outputs;
    for (var start = begin; start < stop; start += POSITIONS) {
        score(start, local);
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
        for (var e = local; e < POSITIONS * HEAD_QUADS; e += THREADS) {
            let position = e / HEAD_QUADS;
            let quad = e % HEAD_QUADS;
            // Past the end the cache may contain anything, even NaN, so zeros are used instead.
            var v = vec4<f16>();
            if (live(start + position, quad)) {
                v = values[cache_at(start + position, quad)];
            }
            cached[position * STRIDE + quad] = v;
        }
        workgroupBarrier();
        for (var p = 0u; p < POSITIONS; p += BLOCK) {
            let a = coopLoadT<Weights>(&weights[row * WEIGHT_STRIDE + p / 4u], WEIGHT_STRIDE);
            let low =
                coopLoadT<Weights>(&weights_low[row * WEIGHT_STRIDE + p / 4u], WEIGHT_STRIDE);
            let b0 = coopLoadT<Inputs>(&cached[p * STRIDE + d], STRIDE);
            sums0 = coopMultiplyAdd(a, b0, sums0);
            sums0 = coopMultiplyAdd(low, b0, sums0);
            if (blocks() > 2u) {
                let b1 = coopLoadT<Inputs>(&cached[p * STRIDE + d + BLOCK / 2u], STRIDE);
                sums1 = coopMultiplyAdd(a, b1, sums1);
                sums1 = coopMultiplyAdd(low, b1, sums1);
            }
            if (blocks() > 4u) {
                let b2 = coopLoadT<Inputs>(&cached[p * STRIDE + d + BLOCK], STRIDE);
                sums2 = coopMultiplyAdd(a, b2, sums2);
                sums2 = coopMultiplyAdd(low, b2, sums2);
            }
            if (blocks() > 6u) {
                let b3 = coopLoadT<Inputs>(&cached[p * STRIDE + d + BLOCK / 2u * 3u], STRIDE);
                sums3 = coopMultiplyAdd(a, b3, sums3);
                sums3 = coopMultiplyAdd(low, b3, sums3);
            }
        }
    }
    partial[local] = total;
    finish(sums0, 0u, local);
    finish(sums1, 1u, local);
    finish(sums2, 2u, local);
    finish(sums3, 3u, local);
}
