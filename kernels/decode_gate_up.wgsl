// act(gate[row] . x) * (up[row] . x) for one token, packed for the product that follows.
// Grid: one workgroup for 16 rows; up to whole pieces past the last row, with zeros.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!include shared/pack.wgsl
//!include shared/activation.wgsl
//!include shared/team_{team}.wgsl

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

var<workgroup> outs: array<vec4<f32>, 4>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let t = flat(group, grid);
    let team = local / 32u;
    for (var n = 0u; n < 2u; n++) {
        let place = team + 8u * n;
        let row = 16u * t + place;
        let at = min(row, params.rows - 1u);
        let sums = two_rows(params.gate, at, params.up, at, 0u, local & 31u, 32u);
        let gate = sum32(sums.x, local);
        let up = sum32(sums.y, local);
        if ((local & 31u) == 0u) {
            outs[place / 4u][place % 4u] = select(0.0, activate(gate, params.activation) * up, row < params.rows);
        }
    }
    workgroupBarrier();
    if (local == 0u && t < params.pieces * 2u) {
        pack16(0u, params.pieces, t, array<vec4<f32>, 4>(outs[0], outs[1], outs[2], outs[3]));
    }
}
