// sum = x + RMS norm of y, and the RMS norm of the sum, packed for the products that follow: each
// token's rows, where families normalise what a block gives. The sum is another buffer than x,
// because every workgroup reads all of x.
// Grid: in x, one workgroup per 1024 elements, each of which computes the whole row; in y, tokens.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pack.wgsl
//!include shared/row.wgsl
//!include shared/team_{team}.wgsl

struct Params {
    cols: u32,
    // Pieces of the packed vector.
    pieces: u32,
    // Of the norm of y, and of the norm of the sum.
    eps: f32,
    eps_after: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> y: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(3) var<storage, read> weight_after: array<vec4<f32>>;
@group(1) @binding(4) var<storage, read_write> sum: array<vec4<f32>>;
@group(1) @binding(5) var<storage, read_write> packed: array<u32>;

var<workgroup> parts: array<f32, 16>;
var<workgroup> outs: array<vec4<f32>, 256>;

// A vec4 of each row, zero past their ends.
struct Quad { y: vec4<f32>, weight: vec4<f32>, x: vec4<f32> }

fn quad_at(begin: u32, i: u32, quads: u32) -> Quad {
    if (i >= quads) {
        return Quad(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    }
    let inside = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.cols);
    let zero = vec4<f32>(0.0);
    return Quad(select(zero, y[begin + i], inside), select(zero, weight[i], inside), select(zero, x[begin + i], inside));
}

fn summed(v: Quad, factor: f32) -> vec4<f32> {
    return v.x + v.y * v.weight * factor;
}

// The reciprocal root of the mean over the row; `at` is where the teams' sums go.
fn factor_of(square: f32, eps: f32, at: u32, local: u32) -> f32 {
    let own = sum32(square, local);
    if ((local & 31u) == 0u) {
        parts[at + local / 32u] = own;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += parts[at + i];
    }
    return inverseSqrt(total / f32(params.cols) + eps);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = min((params.cols + 3u) / 4u, arrayLength(&y));
    let begin = row_at(group.y, params.cols);
    let own = group.x * 256u + local;
    // Loaded before anything waits: all of a row of up to 4096, and what is needed last.
    let q0 = quad_at(begin, local, quads);
    let q1 = quad_at(begin, local + 256u, quads);
    let q2 = quad_at(begin, local + 512u, quads);
    let q3 = quad_at(begin, local + 768u, quads);
    let after = weight_after[min(own, quads - 1u)];
    var square = (dot(q0.y, q0.y) + dot(q1.y, q1.y)) + (dot(q2.y, q2.y) + dot(q3.y, q3.y));
    for (var i = local + 1024u; i < quads; i += 256u) {
        let v = quad_at(begin, i, quads).y;
        square += dot(v, v);
    }
    let factor = factor_of(square, params.eps, 0u, local);
    let s0 = summed(q0, factor);
    let s1 = summed(q1, factor);
    let s2 = summed(q2, factor);
    let s3 = summed(q3, factor);
    var mine = select(select(s0, s1, group.x == 1u), select(s2, s3, group.x == 3u), group.x >= 2u);
    square = (dot(s0, s0) + dot(s1, s1)) + (dot(s2, s2) + dot(s3, s3));
    for (var i = local + 1024u; i < quads; i += 256u) {
        let v = summed(quad_at(begin, i, quads), factor);
        square += dot(v, v);
        mine = select(mine, v, i == own);
    }
    outs[local] = select(vec4<f32>(0.0), mine * after * factor_of(square, params.eps_after, 8u, local), own < quads);
    if (own < quads) {
        sum[begin + own] = mine;
    }
    workgroupBarrier();
    if (own < params.pieces * 8u) {
        let i = local & 0xfcu;
        pack16(group.y * params.pieces * 13u, params.pieces, own / 4u,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]), local & 3u);
    }
}
