// The body of expert_gate_up.wgsl and expert_gate_up_biased.wgsl.
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/expert_gate_up_params.wgsl
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
    var expert = 0u;
    if (pair < now.tokens * params.top_k) {
        expert = ids[pair];
        slot = slot_table[params.slots_at + expert];
    }
    var gate_sum = 0.0;
    var up_sum = 0.0;
    if (slot != EMPTY) {
        let gate = in_slot(params.gate, slot, params.slot_stride);
        let up = in_slot(params.up, slot, params.slot_stride);
        let at = (pair / params.top_k) * params.x_stride;
        for (var unit = lane_of(local); unit < gate.units; unit += LANES) {
            gate_sum += dot_unit(unit_at(gate, row, unit), at + unit * 8u);
            up_sum += dot_unit(unit_at(up, row, unit), at + unit * 8u);
        }
    }
    gate_sum = reduce(gate_sum, local);
    up_sum = reduce(up_sum, local);
    if (slot != EMPTY && lane_of(local) == 0u) {
        let sum = joined(gate_sum, up_sum, expert, row, params.activation);
        result[pair * params.result_stride + row] = sum;
    }
}
