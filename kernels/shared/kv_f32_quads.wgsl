// An f32 KV cache, read four elements at a time.
@group(1) @binding(1) var<storage, read> keys: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read> values: array<vec4<f32>>;

fn key_quad(i: u32) -> vec4<f32> {
    return keys[i];
}

fn value_quad(i: u32) -> vec4<f32> {
    return values[i];
}
