// Grouped-query attention over the cache, causal or with some later tokens of the step, with a running softmax: 64 positions at a time;
// each invocation computes one score, then sums its dimensions. head_dim is a multiple of 4, at
// most 512.
// Grid: one workgroup for each (token, head).
//!for kv in f32 f16
//!include shared/attend.wgsl

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(LEAST, 0.0);
}
