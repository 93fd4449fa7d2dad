// Q6_K: planes of nibbles (32 words a block), high pairs of bits (16 words), i8 scales (4 words)
// and f16 d (half a word). A unit has two scales, one for each 16 weights: w = d * scale * (q -
// 32). The order of bits is described in src/infer/quant/planes.rs.

//!section units
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

//!section pieces
fn taken_q6_k(m: Pieces, row: u32, i: u32) -> Taken {
    let b = row * m.row_blocks + (i >> 3u);
    let piece = i & 7u;
    let w = weights[m.base + b * 8u + piece];
    let both = weights[m.base + m.blocks * 8u + b * 4u + (piece >> 1u)];
    let bits = select(both.xy, both.zw, (piece & 1u) == 1u);
    let scales = weights[m.base + m.blocks * 12u + b][piece >> 1u] >> (8u * (piece & 1u));
    let d = half_at(m.base + m.blocks * 13u, b);
    let shifts = vec4<u32>(0u, 2u, 4u, 6u);
    let three = vec4<u32>(0x03030303u);
    let first = ((vec4<u32>(bits.x) >> shifts) & three) << vec4<u32>(4u);
    let second = ((vec4<u32>(bits.y) >> shifts) & three) << vec4<u32>(4u);
    let s = vec2<f32>(f32(bitcast<i32>(scales << 24u) >> 24u), f32(bitcast<i32>(scales << 8u) >> 24u));
    return Taken((w & NIBBLES) | first, ((w >> vec4<u32>(4u)) & NIBBLES) | second, vec4<f32>(s, d, 0.0));
}

fn times_q6_k(t: Taken, a: Acts) -> f32 {
    let p = halves(t.first, t.second, a);
    // The weights are q - 32.
    let sums = t.s.xy * (p - 32.0 * a.sums.zw);
    return t.s.z * (sums.x + sums.y);
}

//!section coop
// The second sixteen's scale is 16 bits further up in `scales`.
struct Raw { quants: vec4<u32>, high: vec2<u32>, scales: u32, d: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let b = row * m.row_blocks + (i >> 3u);
    let piece = i & 7u;
    let both = weights[m.base + m.blocks * 8u + b * 4u + (piece >> 1u)];
    let high = select(both.xy, both.zw, (piece & 1u) == 1u);
    let scales = word_at(m.base + m.blocks * 12u, b * 4u + (piece >> 1u)) >> (8u * (piece & 1u));
    let d = word_at(m.base + m.blocks * 13u, b >> 1u) >> (16u * (b & 1u));
    return Raw(weights[m.base + b * 8u + piece], high, scales, d & 0xffffu);
}

fn q6_k_half(low: vec4<u32>, bits: u32, scale: u32, d: u32) -> Sixteen {
    let high = ((vec4<u32>(bits) >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(0x03030303u)) << vec4<u32>(4u);
    let s = half_bits(d) * f32(bitcast<i32>(scale << 24u) >> 24u);
    return sixteen((low & NIBBLES) | high, s, -32.0 * s);
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    return q6_k_half(r.quants, r.high.x, r.scales, r.d);
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    return q6_k_half(r.quants >> vec4<u32>(4u), r.high.y, r.scales >> 16u, r.d);
}
