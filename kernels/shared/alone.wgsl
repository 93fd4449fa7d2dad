// A kernel's token is the step's only one. Same names as in together.wgsl.
//!include shared/step.wgsl

// Call first: this workgroup's token is that of row `row`.
fn take_row(row: u32) {
}

// The position of a row's token, the same for a whole workgroup.
fn position_of(row: u32) -> u32 {
    return now.position;
}

// A workgroup's row and its number within the row. A grid that is too wide for one dimension is folded
// into y.
fn row_and_item(group: vec3<u32>, grid: vec3<u32>) -> vec2<u32> {
    return vec2<u32>(0u, flat(group, grid));
}

// Whether the step halted, by word 0 of the state, as the layer sees it that would halt with `own`.
fn has_halted(word: u32, own: u32) -> bool {
    return word != 0u;
}

// Where the row's list of blocks begins.
fn list_of(row: u32) -> u32 {
    return 0u;
}
