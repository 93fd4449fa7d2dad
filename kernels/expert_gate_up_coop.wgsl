// expert_gate_up.wgsl for many tokens on cooperative matrices (see linear_coop.wgsl): tiles of 64
// rows of gate and of up by up to TOKENS pairs of one expert. Tiles whose expert is not in this wave
// leave their pairs unchanged. Tiles of more than NARROW pairs are left to the wider kernel, others
// to the narrower one.
// Grid: x by tile of pairs, y by row tile.
//!needs coopmat f16
//!for quantised
//!for blocks in 2 4
//!include shared/step.wgsl
//!include shared/matrix_struct.wgsl
//!include shared/expert_gate_up_params.wgsl
//!include shared/words.wgsl
//!include shared/coop.wgsl
//!include formats/{quantised}.wgsl#coop
//!include shared/slots.wgsl
//!include shared/pairs.wgsl
//!include shared/activation.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> scales: array<f32>;
@group(1) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(3) var<storage, read> pair_order: array<u32>;
@group(1) @binding(4) var<storage, read> tiles: array<vec4<u32>>;
@group(1) @binding(5) var<storage, read> slot_table: array<u32>;
@group(1) @binding(6) var<storage, read_write> result: array<f32>;

var<private> tile: vec4<u32>;
var<private> first_row: u32;

// Past the last row or pair, the last one is computed again and not written.
fn x_row(i: u32) -> u32 {
    return pair_order[tile.y + min(i, tile.z - 1u)] / params.top_k;
}

// The low rows of a tile belong to gate, the high rows to up: those 32 further.
fn emit(row: u32, token: u32, low: f32, high: f32) {
    let to = first_row + row - (row / 64u) * HALF;
    if (to < params.rows && token < tile.z) {
        let pair = pair_order[tile.y + token];
        let scale = scales[pair / params.top_k];
        let gate = activate(low * scale, params.activation);
        result[pair * params.result_stride + to] = gate * (high * scale);
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let mine = tiles[group.x];
    let slot = slot_table[params.slots_at + mine.x];
    if (mine.z == 0u || slot == EMPTY || (mine.z > NARROW) != (TOKENS > NARROW)) {
        return;
    }
    tile = mine;
    first_row = group.y * (ROWS / 2u);
    var gate = in_slot(params.gate, slot, params.slot_stride);
    var up = in_slot(params.up, slot, params.slot_stride);
    gate.base = gate.base / 4u;
    up.base = up.base / 4u;
    let fetched = fetched_row(local);
    let row = min(first_row + fetched - (fetched / 64u) * HALF, params.rows - 1u);
    coop_tile(gate, row, up, row, params.x_stride / 2u, 0u, (params.gate.units + 1u) / 2u,
        params.gate.units, local);
}
