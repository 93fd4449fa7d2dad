// Copies some elements of each head from one row to another, whose other elements stay.
// Grid: one element per invocation.
//!include shared/step.wgsl

struct Params {
    heads: u32,
    // Elements of a head that are copied.
    width: u32,
    source_row: u32,
    result_row: u32,
    // Where they begin in the first head, and from one head to the next.
    source_start: u32,
    source_stride: u32,
    result_start: u32,
    result_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> source: array<f32>;
@group(1) @binding(1) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let each = params.heads * params.width;
    let token = item / each;
    if (token >= now.tokens) {
        return;
    }
    let head = item % each / params.width;
    let i = item % params.width;
    let at = token * params.source_row + params.source_start + head * params.source_stride + i;
    let to = token * params.result_row + params.result_start + head * params.result_stride + i;
    result[to] = source[at];
}
