// expert_down.wgsl for many tokens on cooperative matrices (see linear_coop.wgsl): tiles of ROWS
// rows by up to TOKENS pairs of one expert. Tiles whose expert is not in this wave leave their pairs
// unchanged. As there, each of two kernels has its tiles.
// Grid: x by tile of pairs, y by row tile.
//!needs coopmat f16
//!for quantised
//!for blocks in 2 4
//!include shared/step.wgsl
//!include shared/matrix_struct.wgsl
//!include shared/expert_down_params.wgsl
//!include shared/words.wgsl
//!include shared/coop.wgsl
//!include formats/{quantised}.wgsl#coop
//!include shared/slots.wgsl
//!include shared/pairs.wgsl

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
    return pair_order[tile.y + min(i, tile.z - 1u)];
}

fn put(pair: u32, row: u32, sum: f32) {
    if (row < params.rows) {
        result[pair * params.result_stride + row] = sum * scales[pair];
    }
}

fn emit(row: u32, token: u32, low: f32, high: f32) {
    if (token < tile.z) {
        let pair = pair_order[tile.y + token];
        put(pair, first_row + row, low);
        put(pair, first_row + row + HALF, high);
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
    first_row = group.y * ROWS;
    var m = in_slot(params.down, slot, params.slot_stride);
    m.base = m.base / 4u;
    let row = first_row + fetched_row(local);
    let last = params.rows - 1u;
    coop_tile(m, min(row, last), m, min(row + HALF, last), params.x_stride / 2u, 0u,
        (params.down.units + 1u) / 2u, params.down.units, local);
}
