// linear.wgsl for many tokens on cooperative matrices: weights in f16, and activations from
// halve.wgsl, whose scales are applied to the sums.
// Grid: x by token tile, y by row tile.
//!needs coopmat f16
//!for format
//!for shape in 8x64 16x64 16x128
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/linear_params.wgsl
//!include formats/{format}.wgsl#units
//!include shared/coop_{shape}.wgsl
//!include shared/coop.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<f16>>;
@group(1) @binding(1) var<storage, read> scales: array<f32>;
@group(1) @binding(2) var<storage, read> weights: array<u32>;
@group(1) @binding(3) var<storage, read> bias: array<f32>;
@group(1) @binding(4) var<storage, read_write> result: array<f32>;

var<private> first_row: u32;
var<private> first_token: u32;

fn units() -> u32 {
    return params.weight.units;
}

fn put(token: u32, row: u32, sum: f32) {
    if (row < params.rows && token < now.tokens) {
        let to = params.row_start + row;
        var value = sum * scales[token];
        if (params.has_bias == 1u) {
            value += bias[to];
        }
        result[token * params.result_stride + to] = value;
    }
}

fn emit(row: u32, token: u32, low: f32, high: f32) {
    put(first_token + token, first_row + row, low);
    put(first_token + token, first_row + row + HALF, high);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    first_row = group.y * SIDE;
    first_token = group.x * TOKENS;
    // Past the last row or token, the last one is computed again and not written.
    let row = min(first_row + fetched(local), params.rows - 1u);
    let token = min(first_token + fetched(local), now.tokens - 1u);
    coop_tile(params.weight, row, token * params.x_stride, local);
}
