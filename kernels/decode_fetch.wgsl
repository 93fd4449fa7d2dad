// Copies the experts of a layer that a token misses from host memory into the slots that
// decode_route.wgsl assigned to them.
// Grid: `parts` workgroups for each choice.
//!include shared/step.wgsl

struct Params {
    // vec4s of an expert, in both places.
    quads: u32,
    parts: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> spill: array<vec4<u32>>;
// By choice: (place in host memory, slot), or EMPTY.
@group(1) @binding(1) var<storage, read> fetches: array<vec2<u32>>;
@group(1) @binding(2) var<storage, read_write> slots: array<vec4<u32>>;

const EMPTY: u32 = 0xffffffffu;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let fetch = fetches[flat(group, grid) / params.parts];
    if (fetch.x == EMPTY) {
        return;
    }
    let part = flat(group, grid) % params.parts;
    let source = fetch.x * params.quads;
    let target_at = fetch.y * params.quads;
    let stride = params.parts * 256u;
    var at = part * 256u + local;
    // Four loads in flight, because host memory is far away.
    for (; at + 3u * stride < params.quads; at += 4u * stride) {
        let a = spill[source + at];
        let b = spill[source + at + stride];
        let c = spill[source + at + 2u * stride];
        let d = spill[source + at + 3u * stride];
        slots[target_at + at] = a;
        slots[target_at + at + stride] = b;
        slots[target_at + at + 2u * stride] = c;
        slots[target_at + at + 3u * stride] = d;
    }
    for (; at < params.quads; at += stride) {
        slots[target_at + at] = spill[source + at];
    }
}
