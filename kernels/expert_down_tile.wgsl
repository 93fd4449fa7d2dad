// expert_down.wgsl for many tokens: tiles of 64 rows by 64 pairs of one expert. Tiles whose expert
// is not in this wave leave their pairs unchanged.
// Grid: x by tile of pairs, y by row tile.
//!for format
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/expert_down_params.wgsl
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
    return params.down.units;
}

fn put(tile: vec4<u32>, token: u32, row: u32, sums: vec4<f32>) {
    if (token >= tile.z) {
        return;
    }
    let at = pair_order[tile.y + token] * params.result_stride + row;
    for (var i = 0u; i < 4u; i++) {
        if (row + i < params.rows) {
            result[at + i] = sums[i];
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
    // Past the last row or pair, the last one is computed again and not written.
    let m = in_slot(params.down, slot, params.slot_stride);
    let row = min(group.y * TILE + local, params.rows - 1u);
    let pair = pair_order[tile.y + min(local, tile.z - 1u)];
    let sums = tile_sums(m, row, pair * params.x_stride, local);
    let to = group.y * TILE + low_row(local);
    put(tile, token_of(local, 0u), to, sums.low[0]);
    put(tile, token_of(local, 0u), to + 32u, sums.high[0]);
    put(tile, token_of(local, 1u), to, sums.low[1]);
    put(tile, token_of(local, 1u), to + 32u, sums.high[1]);
    put(tile, token_of(local, 2u), to, sums.low[2]);
    put(tile, token_of(local, 2u), to + 32u, sums.high[2]);
    put(tile, token_of(local, 3u), to, sums.low[3]);
    put(tile, token_of(local, 3u), to + 32u, sums.high[3]);
    put(tile, token_of(local, 4u), to, sums.low[4]);
    put(tile, token_of(local, 4u), to + 32u, sums.high[4]);
    put(tile, token_of(local, 5u), to, sums.low[5]);
    put(tile, token_of(local, 5u), to + 32u, sums.high[5]);
    put(tile, token_of(local, 6u), to, sums.low[6]);
    put(tile, token_of(local, 6u), to + 32u, sums.high[6]);
    put(tile, token_of(local, 7u), to, sums.low[7]);
    put(tile, token_of(local, 7u), to + 32u, sums.high[7]);
}
