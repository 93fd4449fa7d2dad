// The body of decode_expert_gate_up.wgsl and decode_expert_gate_up_biased.wgsl.
//!include shared/{step}.wgsl
//!include shared/pieces.wgsl
//!pieces {format}
//!include shared/team_{team}.wgsl
//!include shared/gated_rows.wgsl
//!include shared/routed.wgsl
//!include shared/decode_expert_gate_up_params.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
// By token and choice: (slot, routing weight).
@group(1) @binding(2) var<storage, read> routed: array<vec2<u32>>;
@group(1) @binding(3) var<storage, read_write> packed: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let groups = params.pieces * 2u;
    let at = row_and_item(group, grid);
    let choice = at.y / groups;
    let t = at.y % groups;
    let pair = at.x * params.top_k + choice;
    let slot = routed[pair].x;
    if (slot == EMPTY) {
        return;
    }
    let gate = in_slot(params.gate, slot * params.slot_stride);
    let up = in_slot(params.up, slot * params.slot_stride);
    gated_rows(gate, up, params.rows, params.activation, expert_of(at.x, choice), at.x * params.gate.pieces * 13u, t, pair * params.pieces * 13u, params.pieces, local);
}
