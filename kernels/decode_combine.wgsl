// Puts the splits of decode_attention together, packed for the product that follows.
// Grid: one workgroup for 64 elements of [heads, head_dim].
//!include shared/step.wgsl
//!include shared/splits.wgsl
//!include shared/pack.wgsl

struct Params {
    heads: u32,
    head_dim: u32,
    window: u32,
    splits_max: u32,
    // Pieces of the packed vector.
    pieces: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> partial: array<f32>;
@group(1) @binding(1) var<storage, read_write> packed: array<u32>;

var<workgroup> outs: array<vec4<f32>, 16>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let splits = splits_of(params.window, params.splits_max);
    let count = min(splits.count, arrayLength(&partial));
    let element = group.x * 64u + local;
    let head = element / params.head_dim;
    let row = params.head_dim + 2u;
    var value = 0.0;
    if (head < params.heads) {
        let at = head * count * row;
        var most = partial[at + params.head_dim];
        for (var s = 1u; s < count; s++) {
            most = max(most, partial[at + s * row + params.head_dim]);
        }
        var total = 0.0;
        for (var s = 0u; s < count; s++) {
            let split_at = at + s * row;
            let weight = exp(partial[split_at + params.head_dim] - most);
            total += weight * partial[split_at + params.head_dim + 1u];
            value += weight * partial[split_at + element % params.head_dim];
        }
        value = value / total;
    }
    outs[local / 4u][local % 4u] = value;
    workgroupBarrier();
    if (local < 4u) {
        let i = local * 4u;
        pack16(0u, params.pieces, group.x * 4u + local,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]));
    }
}
