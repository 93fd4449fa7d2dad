// Rows come from one buffer and go to another, with a weight and a bias for each column.
@group(1) @binding(0) var<storage, read> source: array<f32>;
@group(1) @binding(1) var<storage, read> weight: array<f32>;
@group(1) @binding(2) var<storage, read> bias: array<f32>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

fn load(i: u32) -> f32 {
    return source[i];
}
