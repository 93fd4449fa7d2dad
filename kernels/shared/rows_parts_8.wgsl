// Adds the team's sums up, in the order of `sum32`, and writes them.
fn add_up(sums: Sums, local: u32) {
    let a0 = half_of_four(sums.s0, sums.s4, 16u, local);
    let a1 = half_of_four(sums.s1, sums.s5, 16u, local);
    let a2 = half_of_four(sums.s2, sums.s6, 16u, local);
    let a3 = half_of_four(sums.s3, sums.s7, 16u, local);
    let b0 = half_of_four(a0, a2, 8u, local);
    let b1 = half_of_four(a1, a3, 8u, local);
    let c = half_of_four(b0, b1, 4u, local);
    let d = half_of_two(c.xy, c.zw, 2u, local);
    parts[local] = half_of_one(d.x, d.y, 1u, local);
}
