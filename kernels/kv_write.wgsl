// Appends the batch's keys and values to the cache at their positions.
// Grid: one element of both an invocation.
//!include shared/step.wgsl

struct Params {
    // kv_heads * head_dim, which is also the cache's stride.
    width: u32,
    k_stride: u32,
    v_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> k: array<f32>;
@group(1) @binding(1) var<storage, read> v: array<f32>;
@group(1) @binding(2) var<storage, read_write> keys: array<f32>;
@group(1) @binding(3) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    let token = item / params.width;
    let i = item % params.width;
    if (token >= now.tokens) {
        return;
    }
    let to = (now.position + token) * params.width + i;
    keys[to] = k[token * params.k_stride + i];
    values[to] = v[token * params.v_stride + i];
}
