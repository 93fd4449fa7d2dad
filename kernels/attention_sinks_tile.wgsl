// attention_sinks.wgsl for many tokens (see attention_tile.wgsl).
// Grid: x by 32 queries, y by kv head.
//!for kv in f32 f16
//!include shared/attend_tile.wgsl

@group(1) @binding(5) var<storage, read> sinks: array<f32>;

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(sinks[head], 1.0);
}
