// The parameters of the forms of attention.
struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // f32s from one row of q and of result to the next.
    q_stride: u32,
    result_stride: u32,
    // Positions a token sees, itself included; 0 for all.
    window: u32,
    scale: f32,
}

@group(0) @binding(1) var<uniform> params: Params;

// The sequence's blocks, behind the count of elements that its cache clamped.
struct Blocks { clamped: u32, at: array<u32> }

@group(1) @binding(4) var<storage, read> cache_blocks: Blocks;
