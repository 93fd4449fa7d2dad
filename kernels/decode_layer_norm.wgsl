// Layer norm of each token's row, packed for the products that follow.
// Grid: in x, one workgroup per 1024 elements, each of which sums the whole row, twice; in y, tokens.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/pack.wgsl
//!include shared/row.wgsl
//!include shared/team_{team}.wgsl

struct Params {
    cols: u32,
    // Pieces of the packed vector.
    pieces: u32,
    eps: f32,
    has_bias: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read> bias: array<vec4<f32>>;
@group(1) @binding(3) var<storage, read_write> packed: array<u32>;

var<workgroup> parts: array<f32, 8>;
var<workgroup> outs: array<vec4<f32>, 256>;

// Whether the elements of vec4 `i` are in the row.
fn inside(i: u32) -> vec4<bool> {
    return vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.cols);
}

// The sum over the workgroup, in each invocation. Must be reached by the whole workgroup.
fn total(value: f32, local: u32) -> f32 {
    let sum = sum32(value, local);
    if ((local & 31u) == 0u) {
        parts[local / 32u] = sum;
    }
    workgroupBarrier();
    var all = 0.0;
    for (var i = 0u; i < 8u; i++) {
        all += parts[i];
    }
    workgroupBarrier();
    return all;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = min((params.cols + 3u) / 4u, arrayLength(&x));
    let begin = row_at(group.y, params.cols);
    let quad = group.x * 256u + local;
    var sum = 0.0;
    for (var i = local; i < quads; i += 256u) {
        sum += dot(select(vec4<f32>(0.0), x[begin + i], inside(i)), vec4<f32>(1.0));
    }
    let mean = total(sum, local) / f32(params.cols);
    var square = 0.0;
    for (var i = local; i < quads; i += 256u) {
        let v = select(vec4<f32>(0.0), x[begin + i] - mean, inside(i));
        square += dot(v, v);
    }
    let factor = inverseSqrt(total(square, local) / f32(params.cols) + params.eps);
    var out = vec4<f32>(0.0);
    if (quad < quads) {
        out = (x[begin + quad] - mean) * factor * weight[quad];
        if (params.has_bias == 1u) {
            out += bias[quad];
        }
        out = select(vec4<f32>(0.0), out, inside(quad));
    }
    outs[local] = out;
    workgroupBarrier();
    if (quad < params.pieces * 8u) {
        let i = local & 0xfcu;
        pack16(group.y * params.pieces * 13u, params.pieces, quad / 4u,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]), local & 3u);
    }
}
