// An f16 KV cache in pairs, with the lower element in a word's low bits, read four elements at a
// time. Same names as in kv_f32_quads.wgsl.
@group(1) @binding(1) var<storage, read> keys: array<vec2<u32>>;
@group(1) @binding(2) var<storage, read> values: array<vec2<u32>>;

fn key_quad(i: u32) -> vec4<f32> {
    let words = keys[i];
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}

fn value_quad(i: u32) -> vec4<f32> {
    let words = values[i];
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}
