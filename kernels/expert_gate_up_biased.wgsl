// expert_gate_up.wgsl with biases.
// Grid: one row of the reduction for each (pair, row).
//!for format
//!for reduce in lane group
//!include shared/expert_gate_up.wgsl
//!include shared/joined_biased.wgsl

@group(1) @binding(5) var<storage, read> biases: array<vec2<f32>>;
