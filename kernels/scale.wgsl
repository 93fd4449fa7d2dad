// x *= a weight of one element.
// Grid: one element per invocation, padding included (it stays zero).
//!include shared/step.wgsl

struct Params {
    stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> weights: array<f32>;
@group(1) @binding(1) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    if (item < now.tokens * params.stride) {
        x[item] = x[item] * weights[0];
    }
}
