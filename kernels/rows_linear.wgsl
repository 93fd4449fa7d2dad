// decode_linear for tokens of several sequences, in groups of up to {most}. A team sums four rows at
// once.
// Grid: 32 / split rows per workgroup, matrix after matrix; for each, the groups one after another.
//!for mixture
//!for most in 4 8
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!pieces {mixture}
//!include shared/team_{team}.wgsl
//!sums {mixture}
//!include shared/rows_parts.wgsl
//!include shared/segment.wgsl

struct Params {
    segments: array<Segment, 3>,
    // Teams that share a row: 1, 2, 4 or 8.
    split: u32,
    // 1 if there is a bias; otherwise the binding is a dummy.
    has_bias: u32,
    // 1 to add to what `result` holds.
    adds: u32,
    // vec4s from one token's activations to the next, and f32s from one result to the next.
    x_stride: u32,
    result_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(2) var<storage, read> bias: array<f32>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = take_group(flat(group, grid));
    var s = 0u;
    var before = 0u;
    if (item >= params.segments[0].end) {
        s = 1u;
        before = params.segments[0].end;
    }
    if (item >= params.segments[1].end) {
        s = 2u;
        before = params.segments[1].end;
    }
    let part = params.segments[s];
    let m = Pieces(part.base, part.blocks, part.row_blocks, part.pieces, part.format);
    let team = local / 32u;
    let together = 32u / params.split;
    let begin = (item - before) * together;
    let first = (team % params.split) * 32u + (local & 31u);
    let rows = min(vec4<u32>(begin + team / params.split * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(part.rows - 1u));
    add_up(sums(m, m, rows, params.x_stride, first, params.split * 32u), local);
    workgroupBarrier();
    for (var o = local; o < together * {most}u; o += 256u) {
        let token = o / together;
        let row = begin + o % together;
        if (row >= part.rows || token >= tokens) {
            continue;
        }
        var total = 0.0;
        for (var i = 0u; i < params.split; i++) {
            total += parts[part_at(o % together / 4u * params.split + i, token, o & 3u)];
        }
        let to = part.result_at + row;
        if (params.has_bias == 1u) {
            total += bias[to];
        }
        let at = (first_token + token) * params.result_stride + to;
        if (params.adds == 1u) {
            total += result[at];
        }
        result[at] = total;
    }
}
