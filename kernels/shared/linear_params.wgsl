// The parameters of the variants of a linear product, and the rows that a step needs of it.

struct Params {
    weight: Matrix,
    // The rows row_start .. row_start + rows of the whole matrix.
    row_start: u32,
    rows: u32,
    // vec4s from one row of `x` to the next.
    x_stride: u32,
    // f32s from one row of `result` to the next.
    result_stride: u32,
    // 1 if there is a bias; otherwise the binding is a dummy.
    has_bias: u32,
    // 1 for the Logits op, for which the step says which rows of `x` to use.
    logits: u32,
}

@group(0) @binding(1) var<uniform> params: Params;

// Rows of `result`.
fn row_count() -> u32 {
    return select(now.tokens, now.logit_rows, params.logits == 1u);
}

// The row of `x` from which row `token` of `result` is computed.
fn source_row(token: u32) -> u32 {
    return token + select(0u, now.logit_start, params.logits == 1u);
}
