// Unpacks 1024 f16s with unpack2x16float. WGSL allows an adapter to flush those below 2^-14 (0x0000
// to 0x03ff) to zero, so the host checks before it relies on them.
// Grid: four workgroups.
//!include shared/step.wgsl

struct Params {
    // The first one's bits.
    first: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    result[id.x] = unpack2x16float(params.first + id.x).x;
}
