// A kernel's rows are tokens of several sequences. Same names as in alone.wgsl and step.wgsl.

// As `Step` in step.wgsl, followed by what differs from row to row.
struct Steps {
    tokens: u32,
    position: u32,
    logit_start: u32,
    logit_rows: u32,
    // For two rows each: position, where the list of blocks begins.
    rows: array<vec4<u32>, 8>,
}

@group(0) @binding(0) var<uniform> steps: Steps;

// The step as it is for one row.
struct Now { position: u32 }

var<private> now: Now;

// Unlike `now`, it may decide which way a workgroup goes: browsers take no private variable for
// uniform, and refuse barriers behind one.
fn position_of(row: u32) -> u32 {
    return steps.rows[row / 2u][row % 2u * 2u];
}

fn take_row(row: u32) {
    now.position = position_of(row);
}

// Rows are in y.
fn row_and_item(group: vec3<u32>, grid: vec3<u32>) -> vec2<u32> {
    return vec2<u32>(group.y, group.x);
}

// Another row may halt the step at the same layer. Each row chooses there.
fn has_halted(word: u32, own: u32) -> bool {
    return word != 0u && word != own;
}

fn list_of(row: u32) -> u32 {
    return steps.rows[row / 2u][row % 2u * 2u + 1u];
}
