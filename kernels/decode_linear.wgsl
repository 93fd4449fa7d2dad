// result[row] (+)= x . weight[row] (+ bias[row]) for one token, over up to three matrices in one
// binding (queries, keys and values).
// Grid: 8 / split rows per workgroup, matrix after matrix.
//!for formats
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pieces.wgsl
//!pieces {formats}
//!include shared/team_{team}.wgsl
//!include shared/segment.wgsl

struct Params {
    segments: array<Segment, 3>,
    // Teams that share a row: 1, 2, 4 or 8.
    split: u32,
    // 1 if there is a bias; otherwise the binding is a dummy.
    has_bias: u32,
    // 1 to add to what `result` holds.
    adds: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(2) var<storage, read> bias: array<f32>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

var<workgroup> parts: array<f32, 8>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid);
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
    let row = (item - before) * (8u / params.split) + team / params.split;
    let first = (team % params.split) * 32u + (local & 31u);
    let sum = sum32(one_row(m, min(row, part.rows - 1u), 0u, first, params.split * 32u), local);
    if ((local & 31u) == 0u) {
        parts[team] = sum;
    }
    workgroupBarrier();
    if ((local & 31u) == 0u && team % params.split == 0u && row < part.rows) {
        var total = 0.0;
        for (var i = 0u; i < params.split; i++) {
            total += parts[team + i];
        }
        let to = part.result_at + row;
        if (params.has_bias == 1u) {
            total += bias[to];
        }
        if (params.adds == 1u) {
            total += result[to];
        }
        result[to] = total;
    }
}
