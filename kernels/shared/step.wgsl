// Every kernel's group 0: the step, and its own `Params` (declared in the kernel). A kernel's
// buffers are in group 1, numbered from 0.

struct Step {
    // Tokens of this batch.
    tokens: u32,
    // The first token's position.
    position: u32,
    // The rows of the batch that the Logits op computes: logit_rows rows from logit_start on.
    logit_start: u32,
    logit_rows: u32,
}

@group(0) @binding(0) var<uniform> now: Step;

// A workgroup's number. A grid that is too wide for one dimension is folded into y.
fn flat(workgroup: vec3<u32>, grid: vec3<u32>) -> u32 {
    return workgroup.y * grid.x + workgroup.x;
}
