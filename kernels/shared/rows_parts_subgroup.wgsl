// Adds up by halves, so that each of a team's 32 invocations ends with its share of the sums: a step
// leaves an invocation half of what it had, plus the same half of another's.

fn half_of_four(a: vec4<f32>, b: vec4<f32>, bit: u32, local: u32) -> vec4<f32> {
    let upper = (local & bit) != 0u;
    return select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), bit);
}

fn half_of_two(a: vec2<f32>, b: vec2<f32>, bit: u32, local: u32) -> vec2<f32> {
    let upper = (local & bit) != 0u;
    return select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), bit);
}

fn half_of_one(a: f32, b: f32, bit: u32, local: u32) -> f32 {
    let upper = (local & bit) != 0u;
    return select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), bit);
}
//!include shared/rows_parts_{most}.wgsl
