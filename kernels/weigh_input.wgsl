// result = x * sigmoid(the largest logit), row by row: what an expert that is chosen alone is given.
// Grid: one element per invocation.
//!include shared/step.wgsl

struct Params {
    width: u32,
    // f32s from one row of x and of result to the next, and of the logits.
    stride: u32,
    logits: u32,
    logits_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<f32>;
@group(1) @binding(1) var<storage, read> logits: array<f32>;
@group(1) @binding(2) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.width;
    if (token >= now.tokens) {
        return;
    }
    let row = token * params.logits_stride;
    let count = min(params.logits, arrayLength(&logits));
    var best = logits[row];
    for (var i = 1u; i < count; i++) {
        best = max(best, logits[row + i]);
    }
    let at = token * params.stride + item % params.width;
    result[at] = x[at] / (1.0 + exp(-best));
}
