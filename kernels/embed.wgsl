// out[t] = table[token t] * scale, or out[t] += table[row], for the rows of the table in this range.
// Grid: four columns per invocation.
//!for format
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include formats/{format}.wgsl#units

struct Params {
    table: Matrix,
    // The rows row_start .. row_start + rows of the table.
    row_start: u32,
    rows: u32,
    cols: u32,
    // vec4s from one row of `result` to the next.
    stride: u32,
    scale: f32,
    // 0: the row of the token. 1 and 2: the row of its position or its segment is added.
    by: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> tokens: array<u32>;
@group(1) @binding(1) var<storage, read> weights: array<u32>;
@group(1) @binding(2) var<storage, read_write> result: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.stride;
    let i = item % params.stride;
    let col = i * 4u;
    if (token >= now.tokens || col >= params.cols) {
        return;
    }
    // A token's segment is in the bits above its id.
    var wanted = tokens[token] & 0xffffffu;
    if (params.by == 1u) {
        wanted = now.position + token;
    }
    if (params.by == 2u) {
        wanted = tokens[token] >> 24u;
    }
    let row = wanted - params.row_start;
    if (wanted < params.row_start || row >= params.rows) {
        return;
    }
    let values = quad(unit_at(params.table, row, i / 8u), i % 8u) * params.scale;
    // Padding stays zero.
    let inside = vec4<u32>(col, col + 1u, col + 2u, col + 3u) < vec4<u32>(params.cols);
    let at = token * params.stride + i;
    let before = select(vec4<f32>(0.0), result[at], params.by != 0u);
    result[at] = before + select(vec4<f32>(0.0), values, inside);
}
