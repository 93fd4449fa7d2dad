// Q8_0: planes of i8 (8 words a block, in pieces that span a pair of blocks) and
// f16 d (half a word). A unit is a block.

//!section units
struct Unit { at: u32, scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let first = row * m.row_blocks;
    let at = m.base + (first + (unit / 2u) * 2u) * 8u + (unit % 2u) * 4u;
    return Unit(at, half_at(m.base + m.blocks * 8u, first + unit));
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let word = vec4<i32>(bitcast<i32>(weights[u.at + (i / 4u) * 8u + i % 4u]));
    let q = (word << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u);
    return u.scale * vec4<f32>(q);
}

//!section pieces
fn taken_q8_0(m: Pieces, row: u32, i: u32) -> Taken {
    // Blocks of 32: a row has as many blocks as pieces.
    let at = row * m.row_blocks + i;
    let d = word_at(m.base + m.blocks * 2u, at >> 1u);
    return Taken(weights[m.base + at * 2u], weights[m.base + at * 2u + 1u],
        vec4<f32>(half_bits(d & 0xffffu), half_bits(d >> 16u), 0.0, 0.0));
}

fn times_q8_0(t: Taken, a: Acts) -> f32 {
    let p = halves(t.first, t.second, a);
    return t.s.x * p.x + t.s.y * p.y;
}

//!section coop
struct Raw { first: vec4<u32>, second: vec4<u32>, d: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    // Blocks of 32: a row has as many blocks as pieces.
    let at = row * m.row_blocks + i;
    let d = word_at(m.base + m.blocks * 2u, at >> 1u);
    return Raw(weights[m.base + at * 2u], weights[m.base + at * 2u + 1u], d);
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    return sixteen_signed(r.first, half_bits(r.d & 0xffffu));
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    return sixteen_signed(r.second, half_bits(r.d >> 16u));
}
