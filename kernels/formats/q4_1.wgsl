// Q4_1: planes of nibbles (4 words a block, in pieces that span a pair of blocks) and of
// f16 d and m (1 word). A unit is a block: w = d * q + m.

//!section units
struct Unit { at: u32, shift: u32, scale: f32, low: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let first = row * m.row_blocks;
    let pair = first + (unit / 2u) * 2u;
    let both = weights[m.base + m.blocks * 4u + first + unit];
    return Unit(m.base + pair * 4u, (unit % 2u) * 4u, half_bits(both & 0xffffu), half_bits(both >> 16u));
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let q = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    return u.scale * vec4<f32>(q) + u.low;
}

//!section pieces
fn taken_q4_1(m: Pieces, row: u32, i: u32) -> Taken {
    // Blocks of 32: a row has as many blocks as pieces. A piece contains weights of both blocks of
    // its pair.
    let at = row * m.row_blocks + i;
    let w = weights[m.base + at];
    let first = word_at(m.base + m.blocks, at & 0xfffffffeu);
    let second = word_at(m.base + m.blocks, at | 1u);
    return Taken(w & NIBBLES, (w >> vec4<u32>(4u)) & NIBBLES,
        vec4<f32>(half_bits(first & 0xffffu), half_bits(first >> 16u), half_bits(second & 0xffffu), half_bits(second >> 16u)));
}

fn times_q4_1(t: Taken, a: Acts) -> f32 {
    let p = halves(t.first, t.second, a);
    return t.s.x * p.x + t.s.y * a.sums.z + t.s.z * p.y + t.s.w * a.sums.w;
}

//!section coop
// Scale and minimum of the first block of a pair and of the second.
struct Raw { quants: vec4<u32>, first: u32, second: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let at = row * m.row_blocks + i;
    let first = word_at(m.base + m.blocks, at & 0xfffffffeu);
    return Raw(weights[m.base + at], first, word_at(m.base + m.blocks, at | 1u));
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    return sixteen(r.quants & NIBBLES, half_bits(r.first & 0xffffu), half_bits(r.first >> 16u));
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    let q = (r.quants >> vec4<u32>(4u)) & NIBBLES;
    return sixteen(q, half_bits(r.second & 0xffffu), half_bits(r.second >> 16u));
}
