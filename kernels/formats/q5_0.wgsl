// Q5_0: planes of nibbles (4 words a block, in pieces that span a pair of blocks),
// fifth bits (1 word) and f16 d (half a word). A unit is a block: w = d * (q - 16).

//!section units
struct Unit { at: u32, shift: u32, fifth: u32, scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let first = row * m.row_blocks;
    let pair = first + (unit / 2u) * 2u;
    let scale = half_at(m.base + m.blocks * 5u, first + unit);
    return Unit(m.base + pair * 4u, (unit % 2u) * 4u, m.base + m.blocks * 4u + pair, scale);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let nibbles = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    let fifth = bytes_of(weights[u.fifth + i / 4u] >> (i % 4u + u.shift)) & vec4<u32>(1u);
    return u.scale * (vec4<f32>(nibbles | (fifth << vec4<u32>(4u))) - 16.0);
}

//!section pieces
fn taken_q5_0(m: Pieces, row: u32, i: u32) -> Taken {
    let at = row * m.row_blocks + i;
    let w = weights[m.base + at];
    let f = fifths(word_at(m.base + m.blocks, at));
    let d = word_at(m.base, m.blocks * 5u + (at >> 1u));
    return Taken((w & NIBBLES) | f[0], ((w >> vec4<u32>(4u)) & NIBBLES) | f[1],
        vec4<f32>(half_bits(d & 0xffffu), half_bits(d >> 16u), 0.0, 0.0));
}

fn times_q5_0(t: Taken, a: Acts) -> f32 {
    let p = halves(t.first, t.second, a);
    return t.s.x * (p.x - 16.0 * a.sums.z) + t.s.y * (p.y - 16.0 * a.sums.w);
}

//!section coop
struct Raw { quants: vec4<u32>, fifth: u32, d: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let at = row * m.row_blocks + i;
    let f = word_at(m.base + m.blocks, at);
    return Raw(weights[m.base + at], f, word_at(m.base, m.blocks * 5u + (at >> 1u)));
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    let d = half_bits(r.d & 0xffffu);
    return sixteen((r.quants & NIBBLES) | fifths(r.fifth)[0], d, -16.0 * d);
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    let d = half_bits(r.d >> 16u);
    return sixteen(((r.quants >> vec4<u32>(4u)) & NIBBLES) | fifths(r.fifth)[1], d, -16.0 * d);
}
