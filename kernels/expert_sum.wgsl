// out[t] = sum over choices j = 0 .. top_k, in that order, of routing weight * outputs[t, j].
// Grid: one element per invocation.
//!include shared/step.wgsl
//!include shared/expert_sum_params.wgsl

@group(1) @binding(0) var<storage, read> outputs: array<f32>;
@group(1) @binding(1) var<storage, read> routing_weights: array<f32>;
@group(1) @binding(2) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.cols;
    let col = item % params.cols;
    if (token >= now.tokens) {
        return;
    }
    var sum = 0.0;
    for (var j = 0u; j < params.top_k; j++) {
        let pair = token * params.top_k + j;
        sum += routing_weights[pair] * outputs[pair * params.pair_stride + col];
    }
    result[token * params.result_stride + col] = sum;
}
