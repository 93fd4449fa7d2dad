// Q4_K: planes of nibbles (32 words a block) and of d, dmin, scales (4 words).
// A unit is a sub-block: w = d * scale * q - dmin * low.

//!section units
//!include shared/k_scales.wgsl#units

struct Unit { at: u32, shift: u32, scale: f32, low: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit / 8u;
    let j = unit % 8u;
    let s = scale_and_low(m.base + m.blocks * 32u + block * 4u, j);
    return Unit(m.base + block * 32u + (j / 2u) * 8u, (j % 2u) * 4u, s.x, s.y);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let q = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    return u.scale * vec4<f32>(q) - u.low;
}

//!section pieces
//!include shared/k_scales.wgsl#pieces

fn taken_q4_k(m: Pieces, row: u32, i: u32) -> Taken {
    let b = row * m.row_blocks + (i >> 3u);
    let w = weights[m.base + b * 8u + (i & 7u)];
    let s = k_scales(weights[m.base + m.blocks * 8u + b], (i & 7u) >> 1u);
    return Taken(w & NIBBLES, (w >> vec4<u32>(4u)) & NIBBLES, s);
}

fn times_q4_k(t: Taken, a: Acts) -> f32 {
    let d = halves(t.first, t.second, a);
    return t.s.x * d.x + t.s.y * d.y - t.s.z * a.sums.z - t.s.w * a.sums.w;
}

//!section coop
//!include shared/k_scales.wgsl#pieces

struct Raw { quants: vec4<u32>, head: vec4<u32> }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let b = row * m.row_blocks + (i >> 3u);
    return Raw(weights[m.base + b * 8u + (i & 7u)], weights[m.base + m.blocks * 8u + b]);
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    let s = k_scales(r.head, (i & 7u) >> 1u);
    return sixteen(r.quants & NIBBLES, s.x, -s.z);
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    let s = k_scales(r.head, (i & 7u) >> 1u);
    return sixteen((r.quants >> vec4<u32>(4u)) & NIBBLES, s.y, -s.w);
}
