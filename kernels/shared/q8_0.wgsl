// Q8_0: planes of i8 (8 words a block) and f16 d (half a word). A unit is a block.

struct Unit { at: u32, scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit;
    return Unit(m.base + block * 8u, half_at(m.base + m.blocks * 8u, block));
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let word = vec4<i32>(bitcast<i32>(weights[u.at + i]));
    let q = (word << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u);
    return u.scale * vec4<f32>(q);
}
