// An f16 KV cache in pairs, with the lower element in a word's low bits. Same names as in
// kv_f32.wgsl.
@group(1) @binding(1) var<storage, read> keys: array<vec2<u32>>;
@group(1) @binding(2) var<storage, read> values: array<u32>;

fn key_quad(i: u32) -> vec4<f32> {
    let words = keys[i];
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}

fn value_at(i: u32) -> f32 {
    return unpack2x16float(values[i / 2u])[i % 2u];
}
