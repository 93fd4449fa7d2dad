// Where the step's row `row` begins in a buffer of activations, in vec4s: rows are padded to 32 f32s
// (src/infer/gpu/buffers.rs). A step of one token has row 0 only.
fn row_at(row: u32, cols: u32) -> u32 {
    return row * ((cols + 31u) / 32u) * 8u;
}
