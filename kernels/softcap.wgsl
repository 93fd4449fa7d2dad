// Caps logits in place: cap * tanh(x / cap).
// Grid: one element of the step's rows of logits per invocation.
//!include shared/step.wgsl
//!include shared/softcap.wgsl

struct Params {
    // Elements of a row.
    width: u32,
    cap: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read_write> logits: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let item = flat(group, grid) * 64u + local;
    if (item < now.logit_rows * params.width) {
        logits[item] = softcapped(logits[item], params.cap);
    }
}
