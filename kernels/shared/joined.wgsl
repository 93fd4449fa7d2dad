// What becomes of a gate and an up: act(gate) * up. Its variant with biases needs the expert and row.
//!include shared/activation.wgsl

fn joined(gate: f32, up: f32, expert: u32, row: u32, kind: u32) -> f32 {
    return activate(gate, kind) * up;
}
