// A gated delta net: for each value head a matrix S of state, and for each token
//   S *= exp(g); S += k (beta (v - k S)); result = q S
// with q and k of unit length, q scaled, g = -exp(decay) softplus(a + shift), beta = sigmoid(b).
// (Yang et al., arXiv 2412.06464.) A key head is at most 256 elements wide.
// Grid: one column of a value head's state per invocation, for all tokens.
//!include shared/step.wgsl

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

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let column = flat(group, grid) * 64u + local;
    if (column >= params.heads * params.value_dim) {
        return;
    }
    let head = column / params.value_dim;
    let key_dim = min(params.key_dim, 256u);
    let key_head = head / (params.heads / params.key_heads);
    let keys_at = params.key_heads * key_dim;
    let at = head * key_dim * params.value_dim + column % params.value_dim;
    var s: array<f32, 256>;
    if (now.position > 0u) {
        let first = entry(now.position) + at;
        for (var i = 0u; i < key_dim; i++) {
            s[i] = states[first + i * params.value_dim];
        }
    }
    for (var t = 0u; t < now.tokens; t++) {
        let row = t * params.x_stride;
        let q_at = row + key_head * key_dim;
        let k_at = q_at + keys_at;
        var qq = 0.0;
        var kk = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let q = x[q_at + i];
            let k = x[k_at + i];
            qq += q * q;
            kk += k * k;
        }
        let q_factor = 1.0 / (sqrt(qq + 1e-6) * sqrt(f32(key_dim)));
        let k_factor = 1.0 / sqrt(kk + 1e-6);
        let gate = t * params.gates_stride + head;
        let beta = 1.0 / (1.0 + exp(-gates[gate]));
        let a = gates[gate + params.heads] + shifts[head];
        let decay = exp(-exp(decays[head]) * softplus(a));
        var known = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let kept = s[i] * decay;
            s[i] = kept;
            known += kept * (x[k_at + i] * k_factor);
        }
        let change = (x[row + 2u * keys_at + column] - known) * beta;
        var sum = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let next = s[i] + x[k_at + i] * k_factor * change;
            s[i] = next;
            sum += next * (x[q_at + i] * q_factor);
        }
        result[t * params.result_stride + column] = sum;
    }
    let to = entry(now.position + now.tokens) + at;
    for (var i = 0u; i < key_dim; i++) {
        states[to + i * params.value_dim] = s[i];
    }
}
