// attention.wgsl with a sink for each head: a score of its own that belongs to no position and only
// adds to the sum of weights.
// Grid: one workgroup for each (token, head).
//!for kv in f32 f16
//!include shared/attend.wgsl

@group(1) @binding(5) var<storage, read> sinks: array<f32>;

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(sinks[head], 1.0);
}
