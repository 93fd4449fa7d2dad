// x = act(x), element by element.
// Grid: one element of a row per invocation.
//!include shared/step.wgsl
//!include shared/activation.wgsl

struct Params {
    // Elements of a row, and f32s from one row to the next. Padding stays zero.
    width: u32,
    stride: u32,
    activation: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.width;
    if (token < now.tokens) {
        let at = token * params.stride + item % params.width;
        x[at] = activate(x[at], params.activation);
    }
}
