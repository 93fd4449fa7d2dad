// decode_expert_gate_up.wgsl with biases.
// Grid: one workgroup per 16 rows of each choice.
//!for format
//!for step in -alone together
//!for team in subgroup group
//!include shared/decode_expert_gate_up.wgsl
//!include shared/joined_biased.wgsl

// The choices' experts are at ids_at.
@group(1) @binding(4) var<storage, read> state: array<u32>;
@group(1) @binding(5) var<storage, read> biases: array<vec2<f32>>;

fn expert_of(row: u32, choice: u32) -> u32 {
    return state[row * params.state_stride + params.ids_at + choice];
}
