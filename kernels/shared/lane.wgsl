// How a row is summed: by one invocation, without barriers. Best where barriers are slow (software
// adapters). Same names as in group.wgsl.

// Invocations that share one row.
const LANES: u32 = 1u;

fn item_of(workgroup: u32, local: u32) -> u32 {
    return workgroup * 64u + local;
}

fn lane_of(local: u32) -> u32 {
    return 0u;
}

// The row's total, in every lane of the row.
fn reduce(value: f32, local: u32) -> f32 {
    return value;
}
