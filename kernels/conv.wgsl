// A causal convolution of each channel with its own filter of at most 8 taps. What lies before the
// batch is in the state, which is replaced (src/infer/recurrent.rs).
// Grid: one channel per invocation, for all tokens.
//!include shared/step.wgsl

struct Params {
    channels: u32,
    taps: u32,
    x_stride: u32,
    result_stride: u32,
    // Entries of a sequence's states.
    ring: u32,
    // Rows of x have three parts b, c, x: c * conv(b * x). Otherwise silu(conv(x)).
    gated: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> x: array<f32>;
// [channels, taps]
@group(1) @binding(1) var<storage, read> weights: array<f32>;
@group(1) @binding(2) var<storage, read> places: array<u32>;
// [places, ring, taps - 1, channels]
@group(1) @binding(3) var<storage, read_write> states: array<f32>;
@group(1) @binding(4) var<storage, read_write> result: array<f32>;

// Where the state after so many tokens is.
fn entry(tokens: u32) -> u32 {
    return (places[0] * params.ring + tokens % params.ring) * (params.taps - 1u) * params.channels;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let c = flat(group, grid) * 64u + local;
    if (c >= params.channels) {
        return;
    }
    let kept = params.taps - 1u;
    var past: array<f32, 8>;
    if (now.position > 0u) {
        let at = entry(now.position) + c;
        for (var j = 0u; j < kept; j++) {
            past[j] = states[at + j * params.channels];
        }
    }
    for (var t = 0u; t < now.tokens; t++) {
        let row = t * params.x_stride + c;
        var input = x[row];
        if (params.gated == 1u) {
            input *= x[row + 2u * params.channels];
        }
        past[kept] = input;
        var sum = 0.0;
        for (var j = 0u; j < params.taps; j++) {
            sum += past[j] * weights[c * params.taps + j];
        }
        for (var j = 0u; j < kept; j++) {
            past[j] = past[j + 1u];
        }
        if (params.gated == 1u) {
            sum *= x[row + params.channels];
        } else {
            sum /= 1.0 + exp(-sum);
        }
        result[t * params.result_stride + c] = sum;
    }
    let to = entry(now.position + now.tokens) + c;
    for (var j = 0u; j < kept; j++) {
        states[to + j * params.channels] = past[j];
    }
}
