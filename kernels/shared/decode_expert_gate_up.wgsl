// The body of decode_expert_gate_up.wgsl and decode_expert_gate_up_biased.wgsl.
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!pieces {format}
//!include shared/team_{team}.wgsl
//!include shared/gated_rows.wgsl
//!include shared/routed.wgsl
//!include shared/decode_expert_gate_up_params.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
// By choice: (slot, routing weight).
@group(1) @binding(2) var<storage, read> routed: array<vec2<u32>>;
@group(1) @binding(3) var<storage, read_write> packed: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let groups = params.pieces * 2u;
    let choice = flat(group, grid) / groups;
    let t = flat(group, grid) % groups;
    let slot = routed[choice].x;
    if (slot == EMPTY) {
        return;
    }
    let gate = in_slot(params.gate, slot * params.slot_stride);
    let up = in_slot(params.up, slot * params.slot_stride);
    gated_rows(gate, up, params.rows, params.activation, expert_of(choice), t, choice * params.pieces * 13u, params.pieces, local);
}
