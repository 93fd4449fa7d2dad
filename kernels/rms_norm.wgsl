// out = x / sqrt(mean(x^2) + eps) * weight over each group of `cols` elements.
// Grid: one row of the reduction for each (token, group).
//!for io in split inplace
//!for reduce in lane group
//!include shared/step.wgsl
//!include shared/{io}.wgsl
//!include shared/{reduce}.wgsl

struct Params {
    cols: u32,
    // Groups of one token.
    groups: u32,
    source_stride: u32,
    result_stride: u32,
    eps: f32,
}

@group(0) @binding(1) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = item_of(flat(group, grid), local);
    let live = item < now.tokens * params.groups;
    let token = item / params.groups;
    let part = (item % params.groups) * params.cols;
    let from_ = token * params.source_stride + part;
    let to = token * params.result_stride + part;
    var squares = 0.0;
    if (live) {
        for (var i = lane_of(local); i < params.cols; i += LANES) {
            let v = load(from_ + i);
            squares += v * v;
        }
    }
    let mean = reduce(squares, local) / f32(params.cols);
    if (live) {
        let factor = 1.0 / sqrt(mean + params.eps);
        for (var i = lane_of(local); i < params.cols; i += LANES) {
            result[to + i] = load(from_ + i) * factor * other[i];
        }
    }
}
