// Combines the splits of decode_attention, packed for the product that follows.
// Grid: in x, one workgroup per 64 elements of [heads, head_dim]; in y, tokens.
//!for step in -alone together
//!include shared/combine.wgsl

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(LEAST, 0.0);
}
