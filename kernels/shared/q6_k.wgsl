// Q6_K: planes of nibbles (32 words a block), high pairs of bits (16 words),
// i8 scales (4 words) and f16 d (half a word). A unit has two scales, one for each
// 16 weights: w = d * scale * (q - 32). Bits as src/infer/gpu/repack.rs says.

struct Unit { at: u32, shift: u32, high: u32, first: f32, second: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit / 8u;
    let j = unit % 8u;
    let d = half_at(m.base + m.blocks * 52u, block);
    let pair = weights[m.base + m.blocks * 48u + block * 4u + j / 2u] >> (16u * (j % 2u));
    let scales = (vec2<i32>(bitcast<i32>(pair)) << vec2<u32>(24u, 16u)) >> vec2<u32>(24u);
    let at = m.base + block * 32u + (j / 2u) * 8u;
    let high = m.base + m.blocks * 32u + block * 16u + (j / 2u) * 4u + j % 2u;
    return Unit(at, (j % 2u) * 4u, high, d * f32(scales.x), d * f32(scales.y));
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let low = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    let high = bytes_of(weights[u.high + (i / 4u) * 2u] >> (2u * (i % 4u))) & vec4<u32>(3u);
    let q = vec4<f32>(low | (high << vec4<u32>(4u))) - 32.0;
    return select(u.second, u.first, i < 4u) * q;
}
