// Packs each token's row of f32 for the products that follow, if the kernel that wrote it did not.
// Grid: in x, one workgroup per 1024 elements; in y, tokens.
//!include shared/step.wgsl
//!include shared/decode_pack_params.wgsl
//!include shared/pack.wgsl
//!include shared/row.wgsl

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read_write> packed: array<u32>;

var<workgroup> outs: array<vec4<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quad = group.x * 256u + local;
    var out = vec4<f32>(0.0);
    if (quad < min((params.cols + 3u) / 4u, arrayLength(&x))) {
        let at = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
        out = select(vec4<f32>(0.0), x[row_at(group.y, params.cols) + quad], at < vec4<u32>(params.cols));
    }
    outs[local] = out;
    workgroupBarrier();
    if (quad < params.pieces * 8u) {
        let i = local & 0xfcu;
        pack16(group.y * params.pieces * 13u, params.pieces, quad / 4u,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]), local & 3u);
    }
}
