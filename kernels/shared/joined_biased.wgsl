// joined.wgsl with biases, which are in `biases`: those of an expert's gates and ups take turns.
// Kind 6 is gpt-oss's: with the gate at most 7 and the up in -7 .. 7, gate * sigmoid(1.702 gate) *
// (up + 1).
//!include shared/activation.wgsl

fn joined(gate: f32, up: f32, expert: u32, row: u32, kind: u32) -> f32 {
    let bias = biases[expert * params.rows + min(row, params.rows - 1u)];
    let g = gate + bias.x;
    let u = up + bias.y;
    if (kind != 6u) {
        return activate(g, kind) * u;
    }
    // Not min and max, which may drop a NaN.
    let low = select(g, 7.0, g > 7.0);
    let within = select(select(u, 7.0, u > 7.0), -7.0, u < -7.0);
    return low / (1.0 + exp(-1.702 * low)) * (within + 1.0);
}
