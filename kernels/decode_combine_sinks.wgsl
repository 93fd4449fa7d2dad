// decode_combine.wgsl with a sink for each head (attention_sinks.wgsl).
// Grid: in x, one workgroup per 64 elements of [heads, head_dim]; in y, tokens.
//!for step in -alone together
//!include shared/combine.wgsl

@group(1) @binding(2) var<storage, read> sinks: array<f32>;

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(sinks[head], 1.0);
}
