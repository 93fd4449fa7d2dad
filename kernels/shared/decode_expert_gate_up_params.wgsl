// The parameters of the variants of decode_expert_gate_up.wgsl.
struct Params {
    // Bases are in vec4s within a slot.
    gate: Pieces,
    @align(16) up: Pieces,
    @align(16) rows: u32,
    // Pieces of a packed result. The tokens' choices' results are one after the other.
    pieces: u32,
    activation: u32,
    // vec4s from one slot to the next.
    slot_stride: u32,
    top_k: u32,
    // Where the layer's choices begin in the state, and words from one token's to the next's; read with
    // biases only.
    ids_at: u32,
    state_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
