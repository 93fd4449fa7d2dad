// x += RMS norm of y: each token's rows, for a norm behind a block.
// Grid: in x, one workgroup per 1024 elements, each of which sums the squares of the whole row of y;
// in y, tokens.
//!for team in subgroup group
//!include shared/step.wgsl
//!include shared/team_{team}.wgsl
//!include shared/row.wgsl

struct Params {
    cols: u32,
    eps: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> y: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read_write> x: array<vec4<f32>>;

var<workgroup> parts: array<f32, 8>;

// Whether the elements of vec4 `i` are in the row.
fn inside(i: u32) -> vec4<bool> {
    return vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.cols);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = min((params.cols + 3u) / 4u, arrayLength(&y));
    let begin = row_at(group.y, params.cols);
    let quad = group.x * 256u + local;
    // Loaded before anything waits.
    var before = vec4<f32>(0.0);
    var scale = vec4<f32>(0.0);
    if (quad < quads) {
        before = x[begin + quad];
        scale = weight[quad];
    }
    var own = vec4<f32>(0.0);
    var square = 0.0;
    for (var i = local; i < quads; i += 256u) {
        let v = select(vec4<f32>(0.0), y[begin + i], inside(i));
        square += dot(v, v);
        own = select(own, v, i == quad);
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
    if (quad < quads) {
        let normed = own * scale * inverseSqrt(total / f32(params.cols) + params.eps);
        x[begin + quad] = select(before, before + normed, inside(quad));
    }
}
