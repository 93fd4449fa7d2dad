// Sets one more buffer aside where decode_route.wgsl has just halted this token, for the layer to be
// begun again with. Leaves what another token set aside alone.
// Grid: one workgroup for 256 vec4s.
//!include shared/step.wgsl

struct Params {
    // vec4s of the buffer.
    quads: u32,
    // Where it lies in `aside`, vec4s.
    at: u32,
    // What word 0 of the state is if the layer halted.
    halt: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> source: array<vec4<u32>>;
// Word 0: 0, or the layer that halted; word 2: whose step it was (its position, counted from 1).
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
