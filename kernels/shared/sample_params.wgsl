// The parameters of the sampling kernels.

struct Params {
    vocab: u32,
    greedy: u32,
    // f32s: the factors for recent tokens' logits that are positive, and for the others.
    penalty_inverse: u32,
    penalty: u32,
    // How many recent tokens are penalised.
    window: u32,
    // Differences are in units of 2^-unit, each of which is scale / 2^35 ranks.
    unit: i32,
    scale: u32,
    // For both, 0 means all. top_p is in units of 2^-32.
    top_k: u32,
    top_p: u32,
    seed_low: u32,
    seed_high: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
