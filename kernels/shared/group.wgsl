// How a row is summed: by the 64 invocations of a workgroup together, in workgroup memory. Same
// names as in lane.wgsl.

// Invocations that share one row.
const LANES: u32 = 64u;

var<workgroup> partial: array<f32, 64>;

fn item_of(workgroup: u32, local: u32) -> u32 {
    return workgroup;
}

fn lane_of(local: u32) -> u32 {
    return local;
}

// The row's total, in every lane of the row. Must be reached by the whole workgroup.
fn reduce(value: f32, local: u32) -> f32 {
    partial[local] = value;
    workgroupBarrier();
    for (var width = 32u; width > 0u; width = width / 2u) {
        if (local < width) {
            partial[local] = partial[local] + partial[local + width];
        }
        workgroupBarrier();
    }
    let total = partial[0];
    workgroupBarrier();
    return total;
}
