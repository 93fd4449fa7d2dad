// Elements are replaced in place. Same names as in split.wgsl.
@group(1) @binding(0) var<storage, read_write> result: array<f32>;
@group(1) @binding(1) var<storage, read> other: array<f32>;

fn load(i: u32) -> f32 {
    return result[i];
}
