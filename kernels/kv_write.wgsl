// Appends the batch's keys and values to the cache at their positions.
// Grid: two elements of keys and of values per invocation (rows have an even length).
//!for kv in f32 f16
//!include shared/step.wgsl
//!include shared/kv_{kv}_write.wgsl
//!include shared/blocks.wgsl

struct Params {
    // kv_heads * head_dim, which is also the cache's stride.
    width: u32,
    k_stride: u32,
    v_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> k: array<f32>;
@group(1) @binding(1) var<storage, read> v: array<f32>;

// The number of elements clamped in the cache, then the sequence's blocks.
struct Blocks { clamped: atomic<u32>, at: array<u32> }

@group(1) @binding(4) var<storage, read_write> cache_blocks: Blocks;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let pairs = params.width / 2u;
    let token = item / pairs;
    let i = item % pairs;
    if (token >= now.tokens) {
        return;
    }
    let position = now.position + token;
    let to = row_of(span_within(position), position) * pairs + i;
    let from_k = token * params.k_stride + 2u * i;
    let from_v = token * params.v_stride + 2u * i;
    let key = vec2<f32>(k[from_k], k[from_k + 1u]);
    let value = vec2<f32>(v[from_v], v[from_v + 1u]);
    keys[to] = kv_pair(key);
    values[to] = kv_pair(value);
    let clamped = beyond(key) + beyond(value);
    if (clamped > 0u) {
        atomicAdd(&cache_blocks.clamped, clamped);
    }
}
