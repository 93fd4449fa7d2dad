// An f32 KV cache, read four elements (keys) or one element (values) at a time.
@group(1) @binding(1) var<storage, read> keys: array<vec4<f32>>;
@group(1) @binding(2) var<storage, read> values: array<f32>;

fn key_quad(i: u32) -> vec4<f32> {
    return keys[i];
}

fn value_at(i: u32) -> f32 {
    return values[i];
}
