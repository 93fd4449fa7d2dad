// An f16 KV cache in pairs, with the lower element in a word's low bits.
@group(1) @binding(2) var<storage, read_write> keys: array<u32>;
@group(1) @binding(3) var<storage, read_write> values: array<u32>;

// Clamped, because an infinite element would make every later token's attention NaN.
fn kv_pair(value: vec2<f32>) -> u32 {
    return pack2x16float(clamp(value, vec2<f32>(-65504.0), vec2<f32>(65504.0)));
}

// How many of the two elements are clamped.
fn beyond(value: vec2<f32>) -> u32 {
    let over = select(vec2<u32>(0u), vec2<u32>(1u), abs(value) > vec2<f32>(65504.0));
    return over.x + over.y;
}
