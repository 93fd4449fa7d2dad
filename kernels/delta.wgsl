// A gated delta net: for each value head a matrix S of state, and for each token
//   S *= exp(g); S += k (beta (v - k S)); result = q S
// with q and k of unit length, q scaled, g = -exp(decay) softplus(a + shift), beta = sigmoid(b).
// (Yang et al., arXiv 2412.06464.) A key head is at most 256 elements wide.
// Grid: columns of the value heads' states, for all tokens (shared/delta_{by}.wgsl).
//!for by in lane group
//!include shared/step.wgsl
//!include shared/delta_{by}.wgsl

struct Params {
    // Heads of queries and keys, and of values.
    key_heads: u32,
    heads: u32,
    key_dim: u32,
    value_dim: u32,
    x_stride: u32,
    gates_stride: u32,
    result_stride: u32,
    // Entries of a sequence's states.
    ring: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
// Queries, keys and values of all heads.
@group(1) @binding(0) var<storage, read> x: array<f32>;
// b of all heads, then a.
@group(1) @binding(1) var<storage, read> gates: array<f32>;
@group(1) @binding(2) var<storage, read> decays: array<f32>;
@group(1) @binding(3) var<storage, read> shifts: array<f32>;
@group(1) @binding(4) var<storage, read> places: array<u32>;
// [places, ring, heads, key_dim, value_dim]
@group(1) @binding(5) var<storage, read_write> states: array<f32>;
@group(1) @binding(6) var<storage, read_write> result: array<f32>;

// Where the state after so many tokens is.
fn entry(tokens: u32) -> u32 {
    let one = params.heads * params.key_dim * params.value_dim;
    return (places[0] * params.ring + tokens % params.ring) * one;
}

// ln(1 + exp(v)), without overflow.
fn softplus(v: f32) -> f32 {
    return max(v, 0.0) + log(1.0 + exp(-abs(v)));
}
