// attention.wgsl for many tokens: a workgroup handles 32 queries that read one kv head (of several
// tokens and heads), with 32 positions at a time and a running softmax. It reads the cache once for
// all 32. head_dim is a multiple of 4, at most 128.
// Grid: x by 32 queries, y by kv head.
//!for kv in f32 f16
//!include shared/attend_tile.wgsl

// What a softmax begins with: its highest score, and the sum of weights.
fn begun(head: u32) -> vec2<f32> {
    return vec2<f32>(LEAST, 0.0);
}
