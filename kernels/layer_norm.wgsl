// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over whole rows.
// Grid: one row of the reduction for each token.
//!for io in split inplace
//!for reduce in lane group
//!include shared/step.wgsl
//!include shared/affine_{io}.wgsl
//!include shared/{reduce}.wgsl

struct Params {
    cols: u32,
    // From one row to the next, in both.
    stride: u32,
    eps: f32,
    has_bias: u32,
}

@group(0) @binding(1) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let token = item_of(flat(group, grid), local);
    let live = token < now.tokens;
    let at = token * params.stride;
    var sum = 0.0;
    if (live) {
        for (var i = lane_of(local); i < params.cols; i += LANES) {
            sum += load(at + i);
        }
    }
    let mean = reduce(sum, local) / f32(params.cols);
    // Around the mean: the difference of two large sums would lose the variance.
    var squares = 0.0;
    if (live) {
        for (var i = lane_of(local); i < params.cols; i += LANES) {
            let v = load(at + i) - mean;
            squares += v * v;
        }
    }
    let variance = reduce(squares, local) / f32(params.cols);
    if (live) {
        let factor = 1.0 / sqrt(variance + params.eps);
        for (var i = lane_of(local); i < params.cols; i += LANES) {
            var v = (load(at + i) - mean) * factor * weight[i];
            if (params.has_bias == 1u) {
                v += bias[i];
            }
            result[at + i] = v;
        }
    }
}
