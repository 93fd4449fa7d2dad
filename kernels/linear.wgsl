// out[t, row] = x[t] . weight[row] + bias[row], for the rows of this range.
// Grid: one row of the reduction for each (token, row).
//!for format
//!for reduce in lane group
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/linear_params.wgsl
//!include formats/{format}.wgsl#units
//!include shared/dot.wgsl
//!include shared/{reduce}.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weights: array<u32>;
@group(1) @binding(2) var<storage, read> bias: array<f32>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = item_of(flat(group, grid), local);
    let token = item / params.rows;
    let row = item % params.rows;
    let live = token < row_count();
    var sum = 0.0;
    if (live) {
        let at = source_row(token) * params.x_stride;
        for (var unit = lane_of(local); unit < params.weight.units; unit += LANES) {
            sum += dot_unit(unit_at(params.weight, row, unit), at + unit * 8u);
        }
    }
    sum = reduce(sum, local);
    if (live && lane_of(local) == 0u) {
        let to = params.row_start + row;
        if (params.has_bias == 1u) {
            sum += bias[to];
        }
        result[token * params.result_stride + to] = sum;
    }
}
