// The parameters of the variants of attention.
struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // f32s from one row of q and of result to the next.
    q_stride: u32,
    result_stride: u32,
    // Positions that a token sees, including its own; 0 for all.
    window: u32,
    scale: f32,
    // Scores are capped to it; 0 for no cap.
    softcap: f32,
    // How many positions after its own a token sees, within the step.
    ahead: u32,
    // A token sees only positions from the last multiple of it on; 0 for no such limit. Only
    // attention.wgsl knows it.
    chunk: u32,
}

@group(0) @binding(1) var<uniform> params: Params;

// The number of elements clamped in the cache, then the sequence's blocks.
struct Blocks { clamped: u32, at: array<u32> }

@group(1) @binding(4) var<storage, read> cache_blocks: Blocks;
