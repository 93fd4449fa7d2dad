// The scale and minimum of sub-block `j` (of 8) in a Q4_K or Q5_K block whose
// 16 bytes f16 d, f16 dmin, 12 bytes of 6-bit pairs begin at word `at`.
// Source: ggml-quants.c, get_scale_min_k4.
fn scale_and_low(at: u32, j: u32) -> vec2<f32> {
    let shift = 8u * (j % 4u);
    let a = weights[at + 1u] >> shift;
    let b = weights[at + 2u] >> shift;
    let c = weights[at + 3u] >> shift;
    let late = j >= 4u;
    let scale = select(a & 63u, (c & 15u) | (((a >> 6u) & 3u) << 4u), late);
    let low = select(b & 63u, ((c >> 4u) & 15u) | (((b >> 6u) & 3u) << 4u), late);
    let d = weights[at];
    return vec2<f32>(half_bits(d & 0xffffu) * f32(scale), half_bits(d >> 16u) * f32(low));
}
