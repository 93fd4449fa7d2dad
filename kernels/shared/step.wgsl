// What every kernel gets in group 0: the step, and (in the kernel) its own `Params`.
// A kernel's buffers are group 1, numbered from 0.

struct Step {
    // Tokens of this batch.
    tokens: u32,
    // The first token's position.
    position: u32,
    // Rows of the batch that the Logits op computes: logit_rows of them from logit_start.
    logit_start: u32,
    logit_rows: u32,
}

@group(0) @binding(0) var<uniform> now: Step;

// A workgroup's number; a grid wider than one dimension allows is folded into y.
fn flat(workgroup: vec3<u32>, grid: vec3<u32>) -> u32 {
    return workgroup.y * grid.x + workgroup.x;
}
