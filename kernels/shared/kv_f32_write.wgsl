// An f32 KV cache, written two elements at a time. Same names as in kv_f16_write.wgsl.
@group(1) @binding(2) var<storage, read_write> keys: array<vec2<f32>>;
@group(1) @binding(3) var<storage, read_write> values: array<vec2<f32>>;

fn kv_pair(value: vec2<f32>) -> vec2<f32> {
    return value;
}

fn beyond(value: vec2<f32>) -> u32 {
    return 0u;
}
