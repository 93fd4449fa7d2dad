// The body of attention_tile.wgsl and attention_sinks_tile.wgsl.
//!include shared/step.wgsl
//!include shared/attention_params.wgsl
//!include shared/softcap.wgsl
//!include shared/blocks.wgsl
//!include shared/kv_{kv}_quads.wgsl

@group(1) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(1) @binding(3) var<storage, read_write> result: array<vec4<f32>>;

const LEAST: f32 = -3.0e38;

// Of 32 dimensions: queries by [dimension][query / 4]; keys by [dimension][position / 4] or
// values by [position][dimension / 4].
var<workgroup> queries: array<vec4<f32>, 256>;
var<workgroup> cached: array<vec4<f32>, 256>;
// [position][query / 4]
var<workgroup> scores: array<vec4<f32>, 256>;
// By query.
var<workgroup> partial: array<f32, 64>;
var<workgroup> highest: array<f32, 32>;
var<workgroup> totals: array<f32, 32>;
var<workgroup> shrink: array<vec4<f32>, 8>;

// Adds a chunk of 32 dimensions of the values to this invocation's four queries and vec4.
// Must be reached by the whole workgroup.
fn add_values(sums: ptr<function, array<vec4<f32>, 4>>, chunk: u32, span: Span, start: u32,
        end: u32, head_at: u32, stride: u32, local: u32) {
    let quads = params.head_dim / 4u;
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        let e = local + i * 64u;
        let position = start + e / 8u;
        let quad = chunk * 8u + e % 8u;
        var v = vec4<f32>(0.0);
        // Past the end the cache may contain anything, even NaN, so zeros are used instead.
        if (position < end && quad < quads) {
            v = value_quad(row_of(span, position) * stride + head_at + quad);
        }
        cached[e] = v;
    }
    workgroupBarrier();
    let rescale = shrink[local % 8u];
    var a = (*sums)[0] * rescale.x;
    var b = (*sums)[1] * rescale.y;
    var c = (*sums)[2] * rescale.z;
    var d = (*sums)[3] * rescale.w;
    for (var k = 0u; k < 256u; k += 8u) {
        let p = scores[k + local % 8u];
        let v = cached[k + local / 8u];
        a += p.x * v;
        b += p.y * v;
        c += p.z * v;
        d += p.w * v;
    }
    *sums = array<vec4<f32>, 4>(a, b, c, d);
}

fn put(row: u32, chunk: u32, sum: vec4<f32>, total: f32, local: u32, kv_head: u32) {
    let sharing = params.heads / params.kv_heads;
    let quad = chunk * 8u + local / 8u;
    if (row >= now.tokens * sharing || quad * 4u >= params.head_dim) {
        return;
    }
    let head = kv_head * sharing + row % sharing;
    let to = (row / sharing) * params.result_stride + head * params.head_dim;
    result[to / 4u + quad] = sum / total;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = params.head_dim / 4u;
    let chunks = (quads + 7u) / 8u;
    let sharing = params.heads / params.kv_heads;
    let kv_head = group.y;
    let head_at = kv_head * quads;
    let stride = params.kv_heads * quads;
    // Queries are numbered token by token, then head by head of those that share kv_head.
    let first = group.x * 32u;
    let rows = now.tokens * sharing;
    let end = min(now.position + min(first + 31u, rows - 1u) / sharing + 1u, arrayLength(&keys));
    var begin = 0u;
    let seen = now.position + first / sharing + 1u;
    if (params.window > 0u && seen > params.window) {
        begin = seen - params.window;
    }
    if (local < 32u) {
        let before = begun(kv_head * sharing + (first + local) % sharing);
        highest[local] = before.x;
        totals[local] = before.y;
    }
    // This invocation's four queries, and their positions.
    let lane = local % 8u;
    let part = local / 8u;
    let four = vec4<u32>(first + lane * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let at = vec4<u32>(now.position) + four / sharing;
    var sums0: array<vec4<f32>, 4>;
    var sums1: array<vec4<f32>, 4>;
    var sums2: array<vec4<f32>, 4>;
    var sums3: array<vec4<f32>, 4>;
    for (var start = begin; start < end; start += 32u) {
        let span = span_at(start);
        var s0 = vec4<f32>(0.0);
        var s1 = vec4<f32>(0.0);
        var s2 = vec4<f32>(0.0);
        var s3 = vec4<f32>(0.0);
        for (var chunk = 0u; chunk < chunks; chunk++) {
            workgroupBarrier();
            for (var i = 0u; i < 4u; i++) {
                let row = local % 32u;
                let c = local / 32u + i * 2u;
                let quad = chunk * 8u + c;
                var query = vec4<f32>(0.0);
                var key = vec4<f32>(0.0);
                if (first + row < rows && quad < quads) {
                    let token = (first + row) / sharing;
                    let head = kv_head * sharing + (first + row) % sharing;
                    query = q[(token * params.q_stride + head * params.head_dim) / 4u + quad];
                }
                if (start + row < end && quad < quads) {
                    key = key_quad(row_of(span, start + row) * stride + head_at + quad);
                }
                let to = c * 32u + row / 4u;
                queries[to][row % 4u] = query.x;
                queries[to + 8u][row % 4u] = query.y;
                queries[to + 16u][row % 4u] = query.z;
                queries[to + 24u][row % 4u] = query.w;
                cached[to][row % 4u] = key.x;
                cached[to + 8u][row % 4u] = key.y;
                cached[to + 16u][row % 4u] = key.z;
                cached[to + 24u][row % 4u] = key.w;
            }
            workgroupBarrier();
            for (var d = 0u; d < 256u; d += 8u) {
                let a = queries[d + lane];
                let b = cached[d + part];
                s0 += a * b.x;
                s1 += a * b.y;
                s2 += a * b.z;
                s3 += a * b.w;
            }
        }
        // The last values' weights were read before the barriers above.
        for (var i = 0u; i < 4u; i++) {
            let position = start + part * 4u + i;
            let behind = vec4<u32>(position) + params.window;
            let visible = (vec4<u32>(position) <= at)
                & ((behind > at) | vec4<bool>(params.window == 0u));
            var s = s0;
            if (i == 1u) { s = s1; }
            if (i == 2u) { s = s2; }
            if (i == 3u) { s = s3; }
            s *= params.scale;
            if (params.softcap > 0.0) {
                s = vec4<f32>(softcapped(s.x, params.softcap), softcapped(s.y, params.softcap),
                    softcapped(s.z, params.softcap), softcapped(s.w, params.softcap));
            }
            scores[(part * 4u + i) * 8u + lane] = select(vec4<f32>(LEAST), s, visible);
        }
        workgroupBarrier();
        // Two invocations a query, 16 positions each.
        let row = local % 32u;
        let from_k = (local / 32u) * 16u;
        var most = highest[row];
        for (var k = from_k; k < from_k + 16u; k++) {
            most = max(most, scores[k * 8u + row / 4u][row % 4u]);
        }
        partial[local] = most;
        workgroupBarrier();
        most = max(partial[row], partial[row + 32u]);
        var total = 0.0;
        for (var k = from_k; k < from_k + 16u; k++) {
            let s = scores[k * 8u + row / 4u][row % 4u];
            // A query that sees nothing here has LEAST for its highest too.
            let weight = select(exp(s - most), 0.0, s <= LEAST);
            scores[k * 8u + row / 4u][row % 4u] = weight;
            total += weight;
        }
        workgroupBarrier();
        partial[local] = total;
        workgroupBarrier();
        if (local < 32u) {
            let factor = exp(highest[local] - most);
            shrink[local / 4u][local % 4u] = factor;
            totals[local] = totals[local] * factor + partial[local] + partial[local + 32u];
            highest[local] = most;
        }
        add_values(&sums0, 0u, span, start, end, head_at, stride, local);
        if (chunks > 1u) {
            add_values(&sums1, 1u, span, start, end, head_at, stride, local);
        }
        if (chunks > 2u) {
            add_values(&sums2, 2u, span, start, end, head_at, stride, local);
        }
        if (chunks > 3u) {
            add_values(&sums3, 3u, span, start, end, head_at, stride, local);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let row = first + lane * 4u + i;
        let total = totals[lane * 4u + i];
        put(row, 0u, sums0[i], total, local, kv_head);
        put(row, 1u, sums1[i], total, local, kv_head);
        put(row, 2u, sums2[i], total, local, kv_head);
        put(row, 3u, sums3[i], total, local, kv_head);
    }
}
