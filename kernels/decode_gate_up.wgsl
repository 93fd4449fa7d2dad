// act(gate[row] . x) * (up[row] . x) for one token, packed for the product that follows.
// Grid: one workgroup per 16 rows. Past the last row, zeros fill whole pieces.
//!for format
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!pieces {format}
//!include shared/team_{team}.wgsl
//!include shared/gated_rows.wgsl
//!include shared/joined.wgsl

struct Params {
    gate: Pieces,
    @align(16) up: Pieces,
    @align(16) rows: u32,
    // Pieces of the packed result.
    pieces: u32,
    activation: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(2) var<storage, read_write> packed: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    gated_rows(params.gate, params.up, params.rows, params.activation, 0u, 0u, flat(group, grid), 0u, params.pieces, local);
}
