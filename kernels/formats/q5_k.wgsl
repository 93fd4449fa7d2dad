// Q5_K: planes of nibbles (32 words a block), fifth bits (8 words) and d, dmin, scales (4 words). A
// unit is a sub-block. The order of bits is described in src/infer/quant/planes.rs.

//!section units
//!include shared/k_scales.wgsl#units

struct Unit { at: u32, shift: u32, fifth: u32, scale: f32, low: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit / 8u;
    let j = unit % 8u;
    let s = scale_and_low(m.base + m.blocks * 40u + block * 4u, j);
    let at = m.base + block * 32u + (j / 2u) * 8u;
    return Unit(at, (j % 2u) * 4u, m.base + m.blocks * 32u + block * 8u + (j / 2u) * 2u, s.x, s.y);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let nibbles = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    let fifth = bytes_of(weights[u.fifth + i / 4u] >> (i % 4u + u.shift)) & vec4<u32>(1u);
    return u.scale * vec4<f32>(nibbles | (fifth << vec4<u32>(4u))) - u.low;
}

//!section pieces
//!include shared/k_scales.wgsl#pieces

fn taken_q5_k(m: Pieces, row: u32, i: u32) -> Taken {
    let b = row * m.row_blocks + (i >> 3u);
    let w = weights[m.base + b * 8u + (i & 7u)];
    let f = fifths(weights[m.base + m.blocks * 8u + b * 2u + ((i & 7u) >> 2u)][i & 3u]);
    let s = k_scales(weights[m.base + m.blocks * 10u + b], (i & 7u) >> 1u);
    return Taken((w & NIBBLES) | f[0], ((w >> vec4<u32>(4u)) & NIBBLES) | f[1], s);
}

fn times_q5_k(t: Taken, a: Acts) -> f32 {
    let d = halves(t.first, t.second, a);
    return t.s.x * d.x + t.s.y * d.y - t.s.z * a.sums.z - t.s.w * a.sums.w;
}

//!section coop
//!include shared/k_scales.wgsl#pieces

struct Raw { quants: vec4<u32>, head: vec4<u32>, fifth: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let b = row * m.row_blocks + (i >> 3u);
    let f = word_at(m.base + m.blocks * 8u, b * 8u + (i & 7u));
    return Raw(weights[m.base + b * 8u + (i & 7u)], weights[m.base + m.blocks * 10u + b], f);
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    let s = k_scales(r.head, (i & 7u) >> 1u);
    return sixteen((r.quants & NIBBLES) | fifths(r.fifth)[0], s.x, -s.z);
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    let s = k_scales(r.head, (i & 7u) >> 1u);
    return sixteen(((r.quants >> vec4<u32>(4u)) & NIBBLES) | fifths(r.fifth)[1], s.y, -s.w);
}
