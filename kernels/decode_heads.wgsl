// One token's queries, keys and values after their products: queries and keys normalised
// (if asked) and turned by the position; keys and values go to the cache as f16.
// Grid: one workgroup for each head: queries, keys, values. head_dim is even, at most 256.
//!include shared/step.wgsl

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Pairs that are turned: (i, i + pairs).
    pairs: u32,
    // 1 if the norm weights are to be used.
    normed: u32,
    eps: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
// Queries, keys and values one after the other.
@group(1) @binding(0) var<storage, read> qkv: array<f32>;
@group(1) @binding(1) var<storage, read> q_norm: array<f32>;
@group(1) @binding(2) var<storage, read> k_norm: array<f32>;
// (cos, sin) by position and pair.
@group(1) @binding(3) var<storage, read> turns: array<vec2<f32>>;
@group(1) @binding(4) var<storage, read_write> q: array<f32>;
@group(1) @binding(5) var<storage, read_write> keys: array<u32>;
@group(1) @binding(6) var<storage, read_write> values: array<u32>;

var<workgroup> head: array<f32, 256>;
var<workgroup> partial: array<f32, 64>;

const HALF_MAX: f32 = 65504.0;

fn half_pair(i: u32) -> u32 {
    let pair = clamp(vec2<f32>(head[2u * i], head[2u * i + 1u]), vec2<f32>(-HALF_MAX), vec2<f32>(HALF_MAX));
    return pack2x16float(pair);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let dim = min(params.head_dim, 256u);
    let is_query = group.x < params.heads;
    let is_value = group.x >= params.heads + params.kv_heads;
    var square = 0.0;
    for (var i = local; i < dim; i += 64u) {
        let v = qkv[group.x * dim + i];
        head[i] = v;
        square += v * v;
    }
    partial[local] = square;
    workgroupBarrier();
    for (var width = 32u; width > 0u; width = width / 2u) {
        if (local < width) {
            partial[local] = partial[local] + partial[local + width];
        }
        workgroupBarrier();
    }
    if (params.normed == 1u && !is_value) {
        let inverse = inverseSqrt(partial[0] / f32(dim) + params.eps);
        for (var i = local; i < dim; i += 64u) {
            head[i] = head[i] * inverse * select(k_norm[i], q_norm[i], is_query);
        }
    }
    workgroupBarrier();
    if (!is_value) {
        for (var i = local; i < params.pairs; i += 64u) {
            let turn = turns[now.position * params.pairs + i];
            let a = head[i];
            let b = head[i + params.pairs];
            head[i] = a * turn.x - b * turn.y;
            head[i + params.pairs] = b * turn.x + a * turn.y;
        }
    }
    workgroupBarrier();
    if (is_query) {
        for (var i = local; i < dim; i += 64u) {
            q[group.x * dim + i] = head[i];
        }
        return;
    }
    let to = now.position * params.kv_heads;
    for (var i = local; i < dim / 2u; i += 64u) {
        if (is_value) {
            values[(to + group.x - params.heads - params.kv_heads) * (dim / 2u) + i] = half_pair(i);
        } else {
            keys[(to + group.x - params.heads) * (dim / 2u) + i] = half_pair(i);
        }
    }
}
