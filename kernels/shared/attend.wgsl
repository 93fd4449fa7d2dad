// The body of attention.wgsl and attention_sinks.wgsl.
//!include shared/step.wgsl
//!include shared/attention_params.wgsl
//!include shared/softcap.wgsl
//!include shared/blocks.wgsl
//!include shared/kv_{kv}.wgsl

@group(1) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

var<workgroup> query: array<vec4<f32>, 128>;
var<workgroup> scores: array<f32, 64>;

const LEAST: f32 = -3.0e38;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid);
    let token = item / params.heads;
    let head = item % params.heads;
    if (token >= now.tokens) {
        return;
    }
    let kv_head = head / (params.heads / params.kv_heads);
    let quads = params.head_dim / 4u;
    let kv_stride = params.kv_heads * params.head_dim;
    for (var i = local; i < quads; i += 64u) {
        query[i] = q[(token * params.q_stride + head * params.head_dim) / 4u + i];
    }
    workgroupBarrier();

    // Positions first .. end.
    let seen = now.position + token + 1u;
    let end = seen + min(params.ahead, now.tokens - 1u - token);
    var first = 0u;
    if (params.window > 0u && seen > params.window) {
        first = seen - params.window;
    }
    if (params.chunk > 0u) {
        first = max(first, (seen - 1u) / params.chunk * params.chunk);
    }
    let before = begun(head);
    var highest = before.x;
    var total = before.y;
    // Dimensions local, local + 64, local + 128, local + 192.
    var sums = vec4<f32>(0.0);
    // Those from 256 on.
    var more = vec4<f32>(0.0);
    for (var start = first; start < end; start += 64u) {
        let count = min(64u, end - start);
        let span = span_at(start);
        var score = LEAST;
        if (local < count) {
            let at = (row_of(span, start + local) * kv_stride + kv_head * params.head_dim) / 4u;
            var sum = 0.0;
            for (var i = 0u; i < quads; i++) {
                sum += dot(query[i], key_quad(at + i));
            }
            score = softcapped(sum * params.scale, params.softcap);
        }
        scores[local] = score;
        workgroupBarrier();
        var tile = highest;
        for (var j = 0u; j < count; j++) {
            tile = max(tile, scores[j]);
        }
        workgroupBarrier();
        scores[local] = select(0.0, exp(score - tile), local < count);
        workgroupBarrier();
        let shrink = exp(highest - tile);
        highest = tile;
        total *= shrink;
        sums *= shrink;
        more *= shrink;
        for (var j = 0u; j < count; j++) {
            let at = row_of(span, start + j) * kv_stride + kv_head * params.head_dim + local;
            let weight = scores[j];
            total += weight;
            if (local < params.head_dim) {
                sums.x += weight * value_at(at);
            }
            if (local + 64u < params.head_dim) {
                sums.y += weight * value_at(at + 64u);
            }
            if (local + 128u < params.head_dim) {
                sums.z += weight * value_at(at + 128u);
            }
            if (local + 192u < params.head_dim) {
                sums.w += weight * value_at(at + 192u);
            }
            if (params.head_dim > 256u) {
                for (var i = 0u; i < 4u; i++) {
                    if (local + (i + 4u) * 64u < params.head_dim) {
                        more[i] += weight * value_at(at + (i + 4u) * 64u);
                    }
                }
            }
        }
        workgroupBarrier();
    }
    let to = token * params.result_stride + head * params.head_dim;
    for (var i = 0u; i < 4u; i++) {
        let d = local + i * 64u;
        if (d < params.head_dim) {
            result[to + d] = sums[i] / total;
        }
        if (d + 256u < params.head_dim) {
            result[to + d + 256u] = more[i] / total;
        }
    }
}
