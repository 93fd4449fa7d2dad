// Scales and minimums of a Q4_K or Q5_K block.

//!section units
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

//!section pieces
// Scales (x, y) and minimums (z, w) of sub-blocks 2 c and 2 c + 1 in the 16 bytes
// f16 d, f16 dmin, 12 bytes of 6-bit pairs. Source: ggml-quants.c, get_scale_min_k4.
fn k_scales(m: vec4<u32>, c: u32) -> vec4<f32> {
    let shift = 16u * (c & 1u);
    let a = m.y >> shift;
    let b = m.z >> shift;
    let q = m.w >> shift;
    let late = c >= 2u;
    let s = select(a & 0x3f3fu, (q & 0x0f0fu) | ((a >> 2u) & 0x3030u), late);
    let l = select(b & 0x3f3fu, ((q >> 4u) & 0x0f0fu) | ((b >> 2u) & 0x3030u), late);
    let d = half_bits(m.x & 0xffffu);
    let low = half_bits(m.x >> 16u);
    return vec4<f32>(d * f32(s & 0xffu), d * f32((s >> 8u) & 0xffu), low * f32(l & 0xffu), low * f32((l >> 8u) & 0xffu));
}
