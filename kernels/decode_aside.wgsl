// If decode_route.wgsl has just halted this token, saves one more buffer that is needed to restart
// the layer. Does not touch what another token saved.
// Grid: one workgroup per 256 vec4s.
//!include shared/step.wgsl

struct Params {
    // vec4s of the buffer.
    quads: u32,
    // Its offset in `aside`, in vec4s.
    at: u32,
    // The value of word 0 of the state if the layer halted.
    halt: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> source: array<vec4<u32>>;
// Word 0: 0, or the layer that halted. Word 2: the token that halted (its position, counted from
// 1).
@group(1) @binding(1) var<storage, read> state: array<u32>;
@group(1) @binding(2) var<storage, read_write> aside: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    if (state[0] != params.halt || state[2] != now.position + 1u) {
        return;
    }
    let i = flat(group, grid) * 256u + local;
    if (i < params.quads) {
        aside[params.at + i] = source[i];
    }
}
