// The parameters of the sampling kernels.

struct Params {
    vocab: u32,
    greedy: u32,
    // f32s: what recent logits are multiplied by where positive, and elsewhere.
    penalty_inverse: u32,
    penalty: u32,
    // Recent tokens that count.
    window: u32,
    // Differences are counted in 2^-unit, each scale / 2^35 ranks.
    unit: i32,
    scale: u32,
    // 0 means all, for both; top_p in 2^-32.
    top_k: u32,
    top_p: u32,
    seed_low: u32,
    seed_high: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
