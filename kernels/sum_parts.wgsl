// Adds up what linear_coop.wgsl computed in parts of the columns, and the bias.
// Grid: one invocation for each row of weights of each token.
//!include shared/step.wgsl

struct Params {
    // The rows row_start .. row_start + rows of `result`.
    row_start: u32,
    rows: u32,
    parts: u32,
    // f32s from one token to the next in `sums`, and in `result`.
    stride: u32,
    result_stride: u32,
    // 1 if there is a bias; otherwise the binding is a dummy.
    has_bias: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> sums: array<f32>;
@group(1) @binding(1) var<storage, read> bias: array<f32>;
@group(1) @binding(2) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let at = flat(group, grid) * 64u + local;
    let token = at / params.rows;
    let row = at % params.rows;
    if (token >= now.tokens) {
        return;
    }
    var value = 0.0;
    let parts = min(params.parts, arrayLength(&sums));
    for (var part = 0u; part < parts; part++) {
        value += sums[(part * now.tokens + token) * params.stride + row];
    }
    let to = params.row_start + row;
    if (params.has_bias == 1u) {
        value += bias[to];
    }
    result[token * params.result_stride + to] = value;
}
