// linear.wgsl for many tokens on cooperative matrices: weights in f16, and activations from
// halve.wgsl, whose scales are applied to the sums.
// Grid: x by token tile; y by row tile, as often as the columns have parts. The sums of part p are
// p * tokens rows further in `result` (sum_parts.wgsl adds them up).
//!needs coopmat f16
//!for quantised
//!for blocks in 2 4
//!include shared/step.wgsl
//!include shared/matrix_struct.wgsl
//!include shared/linear_params.wgsl
//!include shared/words.wgsl
//!include shared/coop.wgsl
//!include formats/{quantised}.wgsl#coop

@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> scales: array<f32>;
@group(1) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(1) @binding(3) var<storage, read> bias: array<f32>;
@group(1) @binding(4) var<storage, read_write> result: array<f32>;

var<private> first_row: u32;
var<private> first_token: u32;
var<private> part: u32;

// Past the last row or token, the last one is computed again and not written.
fn x_row(i: u32) -> u32 {
    return min(first_token + i, now.tokens - 1u);
}

fn put(token: u32, row: u32, sum: f32) {
    if (row < params.rows && token < now.tokens) {
        let to = params.row_start + row;
        var value = sum * scales[token];
        if (params.has_bias == 1u) {
            value += bias[to];
        }
        result[(part * now.tokens + token) * params.result_stride + to] = value;
    }
}

fn emit(row: u32, token: u32, low: f32, high: f32) {
    put(first_token + token, first_row + row, low);
    put(first_token + token, first_row + row + HALF, high);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let down = (params.rows + ROWS - 1u) / ROWS;
    part = group.y / down;
    first_row = (group.y % down) * ROWS;
    first_token = group.x * TOKENS;
    let groups = (params.weight.units + 1u) / 2u;
    let each = (groups + grid.y / down - 1u) / (grid.y / down);
    let begin = part * each;
    let end = min(begin + each, groups);
    var m = params.weight;
    m.base = m.base / 4u;
    let row = first_row + fetched_row(local);
    let last = params.rows - 1u;
    coop_tile(m, min(row, last), m, min(row + HALF, last), params.x_stride / 2u, begin, end,
        params.weight.units, local);
}
