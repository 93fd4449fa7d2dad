// linear.wgsl for many tokens: tiles of 64 rows by 64 tokens.
// Grid: x by token tile, y by row tile.
//!for format
//!include shared/step.wgsl
//!include shared/matrix.wgsl
//!include shared/linear_params.wgsl
//!include formats/{format}.wgsl#units
//!include shared/tile.wgsl

@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weights: array<u32>;
@group(1) @binding(2) var<storage, read> bias: array<f32>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

fn units() -> u32 {
    return params.weight.units;
}

fn put(token: u32, row: u32, sums: vec4<f32>) {
    if (token >= row_count()) {
        return;
    }
    for (var i = 0u; i < 4u; i++) {
        if (row + i < params.rows) {
            let to = params.row_start + row + i;
            var sum = sums[i];
            if (params.has_bias == 1u) {
                sum += bias[to];
            }
            result[token * params.result_stride + to] = sum;
        }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    // Past the last row or token, the last one is computed again and not written.
    let row = min(group.y * TILE + local, params.rows - 1u);
    let token = min(group.x * TILE + local, row_count() - 1u);
    let sums = tile_sums(params.weight, row, source_row(token) * params.x_stride, local);
    let to = group.y * TILE + low_row(local);
    let first = group.x * TILE;
    put(first + token_of(local, 0u), to, sums.low[0]);
    put(first + token_of(local, 1u), to, sums.low[1]);
    put(first + token_of(local, 2u), to, sums.low[2]);
    put(first + token_of(local, 3u), to, sums.low[3]);
    put(first + token_of(local, 4u), to, sums.low[4]);
    put(first + token_of(local, 5u), to, sums.low[5]);
    put(first + token_of(local, 6u), to, sums.low[6]);
    put(first + token_of(local, 7u), to, sums.low[7]);
    put(first + token_of(local, 0u), to + 32u, sums.high[0]);
    put(first + token_of(local, 1u), to + 32u, sums.high[1]);
    put(first + token_of(local, 2u), to + 32u, sums.high[2]);
    put(first + token_of(local, 3u), to + 32u, sums.high[3]);
    put(first + token_of(local, 4u), to + 32u, sums.high[4]);
    put(first + token_of(local, 5u), to + 32u, sums.high[5]);
    put(first + token_of(local, 6u), to + 32u, sums.high[6]);
    put(first + token_of(local, 7u), to + 32u, sums.high[7]);
}
