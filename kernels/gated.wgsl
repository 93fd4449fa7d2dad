// out = act(gate) * up, element by element over padded rows (padding stays zero). In place,
// `swapped` means that the buffer that is replaced is `up`.
// Grid: one element per invocation.
//!for io in split inplace
//!include shared/step.wgsl
//!include shared/{io}.wgsl
//!include shared/activation.wgsl

struct Params {
    stride: u32,
    activation: u32,
    swapped: u32,
}

@group(0) @binding(1) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    if (item >= now.tokens * params.stride) {
        return;
    }
    let a = load(item);
    let b = other[item];
    let swap = params.swapped == 1u;
    result[item] = activate(select(a, b, swap), params.activation) * select(b, a, swap);
}
