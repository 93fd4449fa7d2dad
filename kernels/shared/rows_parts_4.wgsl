// Adds the team's sums up, in the order of `sum32`, and writes them.
fn add_up(sums: Sums, local: u32) {
    let a0 = half_of_four(sums.s0, sums.s2, 16u, local);
    let a1 = half_of_four(sums.s1, sums.s3, 16u, local);
    let b = half_of_four(a0, a1, 8u, local);
    let c = half_of_two(b.xy, b.zw, 4u, local);
    let d = half_of_one(c.x, c.y, 2u, local);
    let sum = d + subgroupShuffleXor(d, 1u);
    if ((local & 1u) == 0u) {
        parts[local / 2u] = sum;
    }
}
