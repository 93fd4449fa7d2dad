// Rotates pairs (x[i], x[i + half]) of each head by the token's position.
// Grid: one pair per invocation.
//!include shared/step.wgsl

struct Params {
    heads: u32,
    head_dim: u32,
    // Pairs of a head.
    pairs: u32,
    stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
// (cos, sin) by position and pair, multiplied by the attention factor. A table, because WGSL's own
// sine is imprecise for large angles.
@group(1) @binding(0) var<storage, read> rope_table: array<vec2<f32>>;
@group(1) @binding(1) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let pair = item % params.pairs;
    let head = (item / params.pairs) % params.heads;
    let token = item / (params.pairs * params.heads);
    if (token >= now.tokens) {
        return;
    }
    let rotation = rope_table[(now.position + token) * params.pairs + pair];
    let at = token * params.stride + head * params.head_dim + pair;
    let a = x[at];
    let b = x[at + params.pairs];
    x[at] = a * rotation.x - b * rotation.y;
    x[at + params.pairs] = b * rotation.x + a * rotation.y;
}
