// RMS norm of one token's row, packed for the products that follow.
// Grid: one workgroup.
//!include shared/step.wgsl
//!include shared/pack.wgsl

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

var<workgroup> partial: array<f32, 256>;

// vec4 `i` of the row, zero past its end.
fn row(i: u32) -> vec4<f32> {
    let at = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(0.0), x[i], at < vec4<u32>(params.cols));
}

fn scaled(i: u32, inverse: f32) -> vec4<f32> {
    if (4u * i >= params.cols) {
        return vec4<f32>(0.0);
    }
    return row(i) * inverse * weight[i];
}

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
    let quads = min((params.cols + 3u) / 4u, arrayLength(&x));
    var square = 0.0;
    for (var i = local; i < quads; i += 256u) {
        let v = row(i);
        square += dot(v, v);
    }
    partial[local] = square;
    workgroupBarrier();
    for (var width = 128u; width > 0u; width = width / 2u) {
        if (local < width) {
            partial[local] = partial[local] + partial[local + width];
        }
        workgroupBarrier();
    }
    let inverse = inverseSqrt(partial[0] / f32(params.cols) + params.eps);
    let groups = min(params.pieces * 2u, arrayLength(&packed));
    for (var t = local; t < groups; t += 256u) {
        pack16(0u, params.pieces, t, array<vec4<f32>, 4>(scaled(4u * t, inverse),
            scaled(4u * t + 1u, inverse), scaled(4u * t + 2u, inverse), scaled(4u * t + 3u, inverse)));
    }
}
