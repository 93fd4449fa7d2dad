// expert_sum.wgsl with a bias of each expert, which is added to its output.
// Grid: one element per invocation.
//!include shared/step.wgsl
//!include shared/expert_sum_params.wgsl

@group(1) @binding(0) var<storage, read> outputs: array<f32>;
@group(1) @binding(1) var<storage, read> routing_weights: array<f32>;
@group(1) @binding(2) var<storage, read_write> result: array<f32>;
@group(1) @binding(3) var<storage, read> ids: array<u32>;
@group(1) @binding(4) var<storage, read> biases: array<f32>;

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
        let output = outputs[pair * params.pair_stride + col] + biases[ids[pair] * params.cols + col];
        sum += routing_weights[pair] * output;
    }
    result[token * params.result_stride + col] = sum;
}
