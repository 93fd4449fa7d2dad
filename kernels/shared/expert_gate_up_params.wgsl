// The parameters of the variants of an expert's first half.
struct Params {
    // Bases are in words within a slot.
    gate: Matrix,
    up: Matrix,
    rows: u32,
    top_k: u32,
    // Words from one slot to the next.
    slot_stride: u32,
    // Where this layer's and chunk's experts begin in slot_table.
    slots_at: u32,
    // vec4s from one row of `x` to the next.
    x_stride: u32,
    result_stride: u32,
    activation: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
