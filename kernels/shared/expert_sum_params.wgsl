// The parameters of expert_sum.wgsl and its variant with biases.
struct Params {
    cols: u32,
    top_k: u32,
    // f32s from one pair to the next in `outputs`, and from one row to the next in `result`.
    pair_stride: u32,
    result_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
