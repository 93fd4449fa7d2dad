// Teams of 32 invocations that sum in workgroup memory. Same names as in team_subgroup.wgsl.

var<workgroup> team_sums: array<f32, 256>;

// The team's total, in each of its invocations. Must be reached by the whole workgroup.
fn sum32(value: f32, local: u32) -> f32 {
    team_sums[local] = value;
    workgroupBarrier();
    for (var width = 16u; width > 0u; width = width / 2u) {
        if ((local & 31u) < width) {
            team_sums[local] = team_sums[local] + team_sums[local + width];
        }
        workgroupBarrier();
    }
    let total = team_sums[local & 0xe0u];
    workgroupBarrier();
    return total;
}

// The team's maximum, likewise.
fn max32(value: f32, local: u32) -> f32 {
    team_sums[local] = value;
    workgroupBarrier();
    for (var width = 16u; width > 0u; width = width / 2u) {
        if ((local & 31u) < width) {
            team_sums[local] = max(team_sums[local], team_sums[local + width]);
        }
        workgroupBarrier();
    }
    let most = team_sums[local & 0xe0u];
    workgroupBarrier();
    return most;
}
