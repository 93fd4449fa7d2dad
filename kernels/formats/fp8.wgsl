// FP8: planes of bytes (32 words a block, in order) and of f32 d (a word). Four units are a block:
// w = d * the number that a byte is, of one bit of sign, four of exponent and three of fraction.

//!section units
struct Unit { at: u32, scale: f32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    let block = row * m.row_blocks + unit / 4u;
    let scale = bitcast<f32>(weights[m.base + m.blocks * 32u + block]);
    return Unit(m.base + block * 32u + (unit % 4u) * 8u, scale);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let byte = bytes_of(weights[u.at + i]);
    let magnitude = byte & vec4<u32>(127u);
    let normal = bitcast<vec4<f32>>((magnitude << vec4<u32>(20u)) + vec4<u32>(0x3c000000u));
    let value = select(normal, vec4<f32>(magnitude) * 0x1p-9f, magnitude < vec4<u32>(8u));
    return u.scale * value * (1.0 - 2.0 * vec4<f32>(byte >> vec4<u32>(7u)));
}

//!section pieces
//!include formats/fp8.wgsl#number

// Four weights times their activations.
fn fp8_dot(word: u32, x: vec4<u32>) -> f32 {
    let bytes = (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
    return dot(fp8_number(bytes), bitcast<vec4<f32>>(x));
}

fn taken_fp8(m: Pieces, row: u32, i: u32) -> Taken {
    let at = row * m.row_blocks * 8u + i;
    let w = weights[m.base + at];
    let d = bitcast<f32>(word_at(m.base + m.blocks * 8u, at >> 3u));
    return Taken(w, vec4<u32>(0u), vec4<f32>(d));
}

fn times_fp8(t: Taken, a: Acts) -> f32 {
    let w = t.first;
    let sum = fp8_dot(w.x, a.high) + fp8_dot(w.y, a.high2) + fp8_dot(w.z, a.low) + fp8_dot(w.w, a.low2);
    return t.s.x * sum;
}

//!section number
fn fp8_number(byte: vec4<u32>) -> vec4<f32> {
    let magnitude = byte & vec4<u32>(127u);
    let sign = (byte & vec4<u32>(128u)) << vec4<u32>(24u);
    let normal = (magnitude << vec4<u32>(20u)) + vec4<u32>(0x3c000000u);
    let small = bitcast<vec4<u32>>(vec4<f32>(magnitude) * 0x1p-9f);
    return bitcast<vec4<f32>>(sign | select(normal, small, magnitude < vec4<u32>(8u)));
}

//!section coop
//!include formats/fp8.wgsl#number

struct Raw { first: vec4<u32>, second: vec4<u32>, d: u32 }

// Bytes are in order, so a piece's halves are 32 bytes apart.
fn raw_at(m: Matrix, row: u32, i: u32) -> Raw {
    let at = row * m.row_blocks * 8u + (i >> 1u) * 4u + (i & 1u);
    let d = word_at(m.base + m.blocks * 8u, at >> 3u);
    return Raw(weights[m.base + at], weights[m.base + at + 2u], d);
}

fn fp8_four(word: u32, d: u32) -> vec4<f16> {
    let bytes = (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
    return vec4<f16>(bitcast<f32>(d) * fp8_number(bytes));
}

fn fp8_sixteen(q: vec4<u32>, d: u32) -> Sixteen {
    return Sixteen(Eight(fp8_four(q.x, d), fp8_four(q.y, d)), Eight(fp8_four(q.z, d), fp8_four(q.w, d)));
}

fn half_0(r: Raw, i: u32) -> Sixteen {
    return fp8_sixteen(r.first, r.d);
}

fn half_1(r: Raw, i: u32) -> Sixteen {
    return fp8_sixteen(r.second, r.d);
}
