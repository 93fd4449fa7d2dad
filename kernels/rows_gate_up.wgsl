// decode_gate_up for tokens of several sequences, in groups of up to {most}.
// Grid: one workgroup per 16 rows and group, the groups one after another. Past the last row, zeros fill whole pieces.
//!for format
//!for most in 4 8
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!pieces {format}
//!include shared/team_{team}.wgsl
//!sums {format}
//!include shared/rows_parts.wgsl
//!include shared/pack.wgsl
//!include shared/joined.wgsl

struct Params {
    gate: Pieces,
    @align(16) up: Pieces,
    @align(16) rows: u32,
    // Pieces of a packed result.
    pieces: u32,
    activation: u32,
    // vec4s from one token's activations to the next.
    x_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(2) var<storage, read_write> packed: array<u32>;

// By token: the 16 rows.
var<workgroup> outs: array<vec4<f32>, 4 * {most}>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let t = take_group(flat(group, grid));
    let begin = 16u * t;
    let place = min(vec2<u32>(begin + local / 32u) + vec2<u32>(0u, 8u), vec2<u32>(params.rows - 1u));
    add_up(sums(params.gate, params.up, place.xyxy, params.x_stride, local & 31u, 32u), local);
    workgroupBarrier();
    if (local < 16u * {most}u) {
        let token = local / 16u;
        let row = local & 15u;
        let gate = parts[part_at(row & 7u, token, row >> 3u)];
        let up = parts[part_at(row & 7u, token, 2u + (row >> 3u))];
        outs[local / 4u][local & 3u] = select(0.0, joined(gate, up, 0u, begin + row, params.activation), begin + row < params.rows);
    }
    workgroupBarrier();
    let token = local / 4u;
    if (token < tokens && t < params.pieces * 2u) {
        pack16((first_token + token) * params.pieces * 13u, params.pieces, t,
            array<vec4<f32>, 4>(outs[4u * token], outs[4u * token + 1u], outs[4u * token + 2u], outs[4u * token + 3u]), local & 3u);
    }
}
