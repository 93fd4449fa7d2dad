// Copies the wanted rows of states into the result, without their padding.
// Grid: one element of a row per invocation.
//!include shared/step.wgsl

struct Params {
    // Elements of a row, and f32s from one row of `x` to the next.
    width: u32,
    stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<f32>;
@group(1) @binding(1) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let row = item / params.width;
    if (row < now.logit_rows) {
        result[item] = x[(now.logit_start + row) * params.stride + item % params.width];
    }
}
