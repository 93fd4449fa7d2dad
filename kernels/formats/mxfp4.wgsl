// MXFP4: planes of nibbles (4 words a block, in pieces that span a pair of blocks) and of exponents
// (a byte a block). A unit is a block: w = 2^(e - 127) * the number that a nibble is, of one bit of
// sign, two of exponent and one of fraction. Twice the numbers are whole: 0, 1, 2, 3, 4, 6, 8, 12.

//!section units
struct Unit { at: u32, shift: u32, half_scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit;
    let e = (weights[m.base + m.blocks * 4u + block / 4u] >> (8u * (block % 4u))) & 0xffu;
    let half_scale = bitcast<f32>((max(e, 1u) - 1u) << 23u);
    return Unit(m.base + (block - unit % 2u) * 4u, (unit % 2u) * 4u, half_scale);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let q = bytes_of(weights[u.at + i] >> u.shift) & vec4<u32>(15u);
    let exponent = (q >> vec4<u32>(1u)) & vec4<u32>(3u);
    let one = min(exponent, vec4<u32>(1u));
    let whole = ((q & vec4<u32>(1u)) | (one << vec4<u32>(1u))) << (exponent - one);
    return u.half_scale * vec4<f32>(whole) * (1.0 - 2.0 * vec4<f32>(q >> vec4<u32>(3u)));
}

//!section pieces
//!include formats/mxfp4.wgsl#signed

fn taken_mxfp4(m: Pieces, row: u32, i: u32) -> Taken {
    // Blocks of 32: a row has as many blocks as pieces.
    let at = row * m.row_blocks + i;
    let w = weights[m.base + at];
    let quants = fp4_quants(w);
    let e = word_at(m.base + m.blocks, at >> 2u) >> (16u * ((at >> 1u) & 1u));
    return Taken(quants[0], quants[1], vec4<f32>(fp4_half_scale(e & 0xffu), fp4_half_scale((e >> 8u) & 0xffu), 0.0, 0.0));
}

fn times_mxfp4(t: Taken, a: Acts) -> f32 {
    let p = halves(t.first, t.second, a);
    return t.s.x * p.x + t.s.y * p.y;
}

//!section signed
const FP4_ONES: vec4<u32> = vec4<u32>(0x11111111u);
const FP4_SEVENS: vec4<u32> = vec4<u32>(0x77777777u);

// Negates the bytes of `v` where `ones` has a 1. None of these may be 0.
fn fp4_negated(v: vec4<u32>, ones: vec4<u32>) -> vec4<u32> {
    return (v ^ (ones * 255u)) + ones;
}

fn fp4_half_scale(e: u32) -> f32 {
    return bitcast<f32>((max(e, 1u) - 1u) << 23u);
}

// Twice the numbers of a piece, as signed bytes: the first sixteen and the second.
fn fp4_quants(w: vec4<u32>) -> array<vec4<u32>, 2> {
    // Eight nibbles at once: from 4 on a magnitude is itself, its low two bits once more, and 2 for
    // the largest.
    let low = w & FP4_SEVENS;
    let more = w & (((w >> vec4<u32>(2u)) & FP4_ONES) * 3u);
    let v = low + more + ((more & (more >> vec4<u32>(1u)) & FP4_ONES) << vec4<u32>(1u));
    // The sign bits of what is not 0.
    let minus = (low + FP4_SEVENS) & w & vec4<u32>(0x88888888u);
    let first = fp4_negated(v & NIBBLES, (minus >> vec4<u32>(3u)) & ONES);
    let second = fp4_negated((v >> vec4<u32>(4u)) & NIBBLES, (minus >> vec4<u32>(7u)) & ONES);
    return array<vec4<u32>, 2>(first, second);
}

//!section coop
//!include formats/mxfp4.wgsl#signed

// The exponents of both blocks of a pair are in the low bytes of `e`.
struct Raw { quants: vec4<u32>, e: u32 }

fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let at = row * m.row_blocks + i;
    let e = word_at(m.base + m.blocks, at >> 2u) >> (16u * ((at >> 1u) & 1u));
    return Raw(weights[m.base + at], e);
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    return sixteen_signed(fp4_quants(r.quants)[0], fp4_half_scale(r.e & 0xffu));
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    return sixteen_signed(fp4_quants(r.quants)[1], fp4_half_scale((r.e >> 8u) & 0xffu));
}
