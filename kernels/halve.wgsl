// Rows of activations as f16, each scaled by the power of two that brings its largest magnitude to
// 2^14 .. 2^15, so that no element overflows and few underflow. The inverse scale is stored for
// each row. Scaling is exact; only the conversion to f16 rounds.
// Grid: one workgroup for each row.
//!include shared/step.wgsl

struct Params {
    // vec4s from one row to the next, in both.
    stride: u32,
    // Rows of each token.
    per_token: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read_write> halves: array<vec2<u32>>;
@group(1) @binding(2) var<storage, read_write> scales: array<f32>;

var<workgroup> largest: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let row = flat(group, grid);
    let live = row < now.tokens * params.per_token;
    let end = select(0u, min(params.stride, arrayLength(&source)), live);
    let at = row * params.stride;
    var most = vec4<f32>(0.0);
    for (var i = local; i < end; i += 64u) {
        most = max(most, abs(source[at + i]));
    }
    largest[local] = max(max(most.x, most.y), max(most.z, most.w));
    workgroupBarrier();
    for (var width = 32u; width > 0u; width = width / 2u) {
        if (local < width) {
            largest[local] = max(largest[local], largest[local + width]);
        }
        workgroupBarrier();
    }
    // 2^(14 - e) and its inverse, for a largest magnitude of 2^e .. 2^(e + 1); both stay normal.
    let exponent = clamp(bitcast<u32>(largest[0]) >> 23u, 15u, 254u);
    let scale = bitcast<f32>((268u - exponent) << 23u);
    for (var i = local; i < end; i += 64u) {
        let v = source[at + i] * scale;
        halves[at + i] = vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
    }
    if (live && local == 0u) {
        scales[row] = bitcast<f32>((exponent - 14u) << 23u);
    }
}
