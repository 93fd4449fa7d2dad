// result = source, to measure how fast a kernel can copy (the driver's own copies may be slower).
// Grid: four vec4s per invocation, 256 vec4s apart.
//!include shared/step.wgsl

struct Params {
    // vec4s to copy.
    count: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read_write> result: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let first = flat(group, grid) * 1024u + local;
    for (var n = 0u; n < 4u; n++) {
        let i = first + n * 256u;
        if (i < params.count) {
            result[i] = source[i];
        }
    }
}
