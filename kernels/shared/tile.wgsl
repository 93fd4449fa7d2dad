// 64 rows of weights by 64 rows of activations, 32 columns at a time: a workgroup of 64 unpacks
// each weight once for all its tokens. Each invocation fetches one row of both and sums an 8 by 8
// part: its `low` rows are 4 * (local % 8) .. + 4, its `high` rows are 32 further; its tokens are 4
// * (local / 8) .. + 4 and those 32 further. Sums run over the columns in order, whatever else is
// in the tile. The kernel defines `units()`.

const TILE: u32 = 64u;

// [column][row / 4]
var<workgroup> tile_w: array<vec4<f32>, 512>;
var<workgroup> tile_x: array<vec4<f32>, 512>;

// By token of this invocation: four rows each.
struct Sums { low: array<vec4<f32>, 8>, high: array<vec4<f32>, 8> }

// The token of the tile whose sums are at index `i`.
fn token_of(local: u32, i: u32) -> u32 {
    return (local / 8u) * 4u + (i % 4u) + (i / 4u) * 32u;
}

// The first of its low rows.
fn low_row(local: u32) -> u32 {
    return (local % 8u) * 4u;
}

// This invocation fetches `row` of `m` and the activations from vec4 `x_at` on. Must be reached by
// the whole workgroup.
fn tile_sums(m: Matrix, row: u32, x_at: u32, local: u32) -> Sums {
    var a0 = vec4<f32>(); var a1 = vec4<f32>(); var a2 = vec4<f32>(); var a3 = vec4<f32>();
    var a4 = vec4<f32>(); var a5 = vec4<f32>(); var a6 = vec4<f32>(); var a7 = vec4<f32>();
    var b0 = vec4<f32>(); var b1 = vec4<f32>(); var b2 = vec4<f32>(); var b3 = vec4<f32>();
    var b4 = vec4<f32>(); var b5 = vec4<f32>(); var b6 = vec4<f32>(); var b7 = vec4<f32>();
    let w_lane = local % 8u;
    let x_lane = local / 8u;
    let to = local / 4u;
    let part = local % 4u;
    let count = min(units(), arrayLength(&x));
    for (var unit = 0u; unit < count; unit++) {
        let u = unit_at(m, row, unit);
        for (var i = 0u; i < 8u; i++) {
            let w = quad(u, i);
            let v = x[x_at + unit * 8u + i];
            let at = i * 64u + to;
            tile_w[at][part] = w.x;
            tile_w[at + 16u][part] = w.y;
            tile_w[at + 32u][part] = w.z;
            tile_w[at + 48u][part] = w.w;
            tile_x[at][part] = v.x;
            tile_x[at + 16u][part] = v.y;
            tile_x[at + 32u][part] = v.z;
            tile_x[at + 48u][part] = v.w;
        }
        workgroupBarrier();
        for (var k = 0u; k < 512u; k += 16u) {
            let low = tile_w[k + w_lane];
            let high = tile_w[k + 8u + w_lane];
            let near = tile_x[k + x_lane];
            let far = tile_x[k + 8u + x_lane];
            a0 += low * near.x; b0 += high * near.x;
            a1 += low * near.y; b1 += high * near.y;
            a2 += low * near.z; b2 += high * near.z;
            a3 += low * near.w; b3 += high * near.w;
            a4 += low * far.x; b4 += high * far.x;
            a5 += low * far.y; b5 += high * far.y;
            a6 += low * far.z; b6 += high * far.z;
            a7 += low * far.w; b7 += high * far.w;
        }
        workgroupBarrier();
    }
    return Sums(array(a0, a1, a2, a3, a4, a5, a6, a7), array(b0, b1, b2, b3, b4, b5, b6, b7));
}
