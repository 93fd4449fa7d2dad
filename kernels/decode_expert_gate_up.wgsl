// As decode_gate_up, for each of one token's chosen experts, in its slot.
// Grid: one workgroup for 16 rows of each choice.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!include shared/pack.wgsl
//!include shared/activation.wgsl
//!include shared/team_{team}.wgsl

struct Params {
    // Bases are vec4s within a slot.
    gate: Pieces,
    @align(16) up: Pieces,
    @align(16) rows: u32,
    // Pieces of a packed result; the choices' results lie one after the other.
    pieces: u32,
    activation: u32,
    // vec4s from one slot to the next.
    slot_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
// By choice: (slot, share).
@group(1) @binding(2) var<storage, read> routed: array<vec2<u32>>;
@group(1) @binding(3) var<storage, read_write> packed: array<u32>;

const EMPTY: u32 = 0xffffffffu;

var<workgroup> outs: array<vec4<f32>, 4>;

fn in_slot(m: Pieces, at: u32) -> Pieces {
    return Pieces(at + m.base, m.blocks, m.row_blocks, m.pieces, m.format);
}

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
    let team = local / 32u;
    for (var n = 0u; n < 2u; n++) {
        let place = team + 8u * n;
        let row = 16u * t + place;
        let at = min(row, params.rows - 1u);
        let sums = two_rows(gate, at, up, at, 0u, local & 31u, 32u);
        let g = sum32(sums.x, local);
        let u = sum32(sums.y, local);
        if ((local & 31u) == 0u) {
            outs[place / 4u][place % 4u] = select(0.0, activate(g, params.activation) * u, row < params.rows);
        }
    }
    workgroupBarrier();
    if (local == 0u) {
        pack16(choice * params.pieces * 13u, params.pieces, t, array<vec4<f32>, 4>(outs[0], outs[1], outs[2], outs[3]));
    }
}
