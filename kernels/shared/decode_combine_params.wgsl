// The parameters of decode_combine.wgsl and its variant with sinks.
struct Params {
    heads: u32,
    head_dim: u32,
    window: u32,
    splits_max: u32,
    // Pieces of the packed vector.
    pieces: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
