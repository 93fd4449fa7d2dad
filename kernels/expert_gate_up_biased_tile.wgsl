// expert_gate_up_tile.wgsl with biases.
// Grid: x by tile of pairs, y by row tile.
//!for format
//!include shared/expert_gate_up_tile.wgsl
//!include shared/joined_biased.wgsl

@group(1) @binding(6) var<storage, read> biases: array<vec2<f32>>;
