// x += sigmoid(gate) * y over padded rows (padding stays zero), with one gate for each row.
// Grid: four elements per invocation.
//!include shared/step.wgsl

struct Params {
    // vec4s of a row of x and of y.
    stride: u32,
    // f32s from one gate to the next.
    gate_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> y: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> gates: array<f32>;
@group(1) @binding(2) var<storage, read_write> x: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    if (item < now.tokens * params.stride) {
        let gate = gates[item / params.stride * params.gate_stride];
        x[item] = x[item] + y[item] / (1.0 + exp(-gate));
    }
}
