// The parameters of the variants of decode_expert_down.wgsl.
struct Params {
    // The base is in vec4s within a slot.
    down: Pieces,
    @align(16) rows: u32,
    top_k: u32,
    slot_stride: u32,
    // Teams that share a choice: 8 / top_k, at least 1.
    split: u32,
    // 1 to add to what `result` holds.
    adds: u32,
    // Where the layer's choices begin in the state, and words from one token's to the next's; read with
    // biases only.
    ids_at: u32,
    state_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
