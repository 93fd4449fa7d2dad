// Unpacks each token's packed row (shared/pack.wgsl) to f32, exactly, for kernels that read f32.
// Grid: in x, one workgroup per 1024 elements; in y, tokens.
//!include shared/step.wgsl
//!include shared/decode_pack_params.wgsl
//!include shared/row.wgsl

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> packed: array<vec4<u32>>;
// The last element's vec4 is padded with zeros.
@group(1) @binding(1) var<storage, read_write> result: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quad = group.x * 256u + local;
    if (quad < (params.cols + 3u) / 4u) {
        result[row_at(group.y, params.cols) + quad] = packed[(13u * group.y + 5u) * params.pieces + quad];
    }
}
