// RMS norm of each token's row, packed for the products that follow.
// Grid: in x, one workgroup per 1024 elements, each of which sums the squares of the whole row; in y,
// tokens.
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
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read_write> packed: array<u32>;

var<workgroup> parts: array<f32, 8>;
var<workgroup> outs: array<vec4<f32>, 256>;

// vec4 `i` of the row that begins at `begin`, zero past its end.
fn row(begin: u32, i: u32) -> vec4<f32> {
    let at = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(0.0), x[begin + i], at < vec4<u32>(params.cols));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = min((params.cols + 3u) / 4u, arrayLength(&x));
    let begin = row_at(group.y, params.cols);
    let quad = group.x * 256u + local;
    var scale = vec4<f32>(0.0);
    if (quad < quads) {
        scale = weight[quad];
    }
    var out = vec4<f32>(0.0);
    var square = 0.0;
    for (var i = local; i < quads; i += 256u) {
        let v = row(begin, i);
        square += dot(v, v);
        out = select(out, v * scale, i == quad);
    }
    let sum = sum32(square, local);
    if ((local & 31u) == 0u) {
        parts[local / 32u] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += parts[i];
    }
    outs[local] = out * inverseSqrt(total / f32(params.cols) + params.eps);
    workgroupBarrier();
    if (quad < params.pieces * 8u) {
        let i = local & 0xfcu;
        pack16(group.y * params.pieces * 13u, params.pieces, quad / 4u,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]), local & 3u);
    }
}
