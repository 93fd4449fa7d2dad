// Q5_0: planes of nibbles (4 words a block), fifth bits (1 word, bit l for
// weight l) and f16 d (half a word). A unit is a block; low nibbles are weights
// 0..16, high ones 16..32: w = d * (q - 16).

struct Unit { at: u32, fifth: u32, scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit;
    let scale = half_at(m.base + m.blocks * 5u, block);
    return Unit(m.base + block * 4u, weights[m.base + m.blocks * 4u + block], scale);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let nibbles = bytes_of(weights[u.at + i % 4u] >> (4u * (i / 4u))) & vec4<u32>(15u);
    let fifth = (vec4<u32>(u.fifth >> (4u * i)) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u);
    return u.scale * (vec4<f32>(nibbles | (fifth << vec4<u32>(4u))) - 16.0);
}
