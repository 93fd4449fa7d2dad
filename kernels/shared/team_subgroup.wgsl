// Teams of 32 invocations that sum by shuffles. Subgroups must have at least 32 invocations.
//!needs subgroups

// The team's total, in each of its invocations. Must be reached by the whole workgroup.
fn sum32(value: f32, local: u32) -> f32 {
    var sum = value;
    sum += subgroupShuffleXor(sum, 16u);
    sum += subgroupShuffleXor(sum, 8u);
    sum += subgroupShuffleXor(sum, 4u);
    sum += subgroupShuffleXor(sum, 2u);
    sum += subgroupShuffleXor(sum, 1u);
    return sum;
}

// The team's maximum, likewise.
fn max32(value: f32, local: u32) -> f32 {
    var most = value;
    most = max(most, subgroupShuffleXor(most, 16u));
    most = max(most, subgroupShuffleXor(most, 8u));
    most = max(most, subgroupShuffleXor(most, 4u));
    most = max(most, subgroupShuffleXor(most, 2u));
    most = max(most, subgroupShuffleXor(most, 1u));
    return most;
}
