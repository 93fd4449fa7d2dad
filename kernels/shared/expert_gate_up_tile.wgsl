// The body of expert_gate_up_tile.wgsl and expert_gate_up_biased_tile.wgsl.
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/expert_gate_up_params.wgsl
//!include formats/{format}.wgsl#units
//!include shared/tile.wgsl
//!include shared/slots.wgsl
//!include shared/pairs.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weights: array<u32>;
@group(1) @binding(2) var<storage, read> pair_order: array<u32>;
@group(1) @binding(3) var<storage, read> tiles: array<vec4<u32>>;
@group(1) @binding(4) var<storage, read> slot_table: array<u32>;
@group(1) @binding(5) var<storage, read_write> result: array<f32>;

fn units() -> u32 {
    return params.gate.units;
}

fn put(tile: vec4<u32>, token: u32, row: u32, gate: vec4<f32>, up: vec4<f32>) {
    if (token >= tile.z) {
        return;
    }
    let at = pair_order[tile.y + token] * params.result_stride + row;
    for (var i = 0u; i < 4u; i++) {
        if (row + i < params.rows) {
            result[at + i] = joined(gate[i], up[i], tile.x, row + i, params.activation);
        }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let tile = tiles[group.x];
    let slot = slot_table[params.slots_at + tile.x];
    if (tile.z == 0u || slot == EMPTY) {
        return;
    }
    // The low rows of the tile belong to gate, the high rows to up. Past the last row or pair, the
    // last one is computed again and not written.
    var m = in_slot(params.gate, slot, params.slot_stride);
    if (local >= TILE / 2u) {
        m = in_slot(params.up, slot, params.slot_stride);
    }
    let row = min(group.y * (TILE / 2u) + local % (TILE / 2u), params.rows - 1u);
    let token = pair_order[tile.y + min(local, tile.z - 1u)] / params.top_k;
    let sums = tile_sums(m, row, token * params.x_stride, local);
    let to = group.y * (TILE / 2u) + low_row(local);
    put(tile, token_of(local, 0u), to, sums.low[0], sums.high[0]);
    put(tile, token_of(local, 1u), to, sums.low[1], sums.high[1]);
    put(tile, token_of(local, 2u), to, sums.low[2], sums.high[2]);
    put(tile, token_of(local, 3u), to, sums.low[3], sums.high[3]);
    put(tile, token_of(local, 4u), to, sums.low[4], sums.high[4]);
    put(tile, token_of(local, 5u), to, sums.low[5], sums.high[5]);
    put(tile, token_of(local, 6u), to, sums.low[6], sums.high[6]);
    put(tile, token_of(local, 7u), to, sums.low[7], sums.high[7]);
}
