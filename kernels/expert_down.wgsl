// result[pair, row] = down_e[row] . x[pair] for each (token, choice) pair whose expert e is in this
// wave. Other pairs are left unchanged.
// Grid: one row of the reduction for each (pair, row).
//!for format
//!for reduce in lane group
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/expert_down_params.wgsl
//!include formats/{format}.wgsl#units
//!include shared/dot.wgsl
//!include shared/{reduce}.wgsl
//!include shared/slots.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weights: array<u32>;
@group(1) @binding(2) var<storage, read> ids: array<u32>;
@group(1) @binding(3) var<storage, read> slot_table: array<u32>;
@group(1) @binding(4) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = item_of(flat(group, grid), local);
    let pair = item / params.rows;
    let row = item % params.rows;
    var slot = EMPTY;
    if (pair < now.tokens * params.top_k) {
        slot = slot_table[params.slots_at + ids[pair]];
    }
    var sum = 0.0;
    if (slot != EMPTY) {
        let down = in_slot(params.down, slot, params.slot_stride);
        let at = pair * params.x_stride;
        for (var unit = lane_of(local); unit < down.units; unit += LANES) {
            sum += dot_unit(unit_at(down, row, unit), at + unit * 8u);
        }
    }
    sum = reduce(sum, local);
    if (slot != EMPTY && lane_of(local) == 0u) {
        result[pair * params.result_stride + row] = sum;
    }
}
