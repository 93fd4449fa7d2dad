// x *= 1 + scale * ln(1 + floor((position + 1) / floor)): queries grow with their position.
// Grid: one element per invocation.
//!include shared/step.wgsl

struct Params {
    width: u32,
    stride: u32,
    // Positions after which the factor grows.
    each: u32,
    scale: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.width;
    if (token >= now.tokens) {
        return;
    }
    let steps = (now.position + token + 1u) / params.each;
    let at = token * params.stride + item % params.width;
    x[at] = x[at] * (1.0 + params.scale * log(1.0 + f32(steps)));
}
