// A weight matrix as one token meets it: rows of pieces (src/infer/gpu/repack.rs),
// taken as vec4s from `weights`, times activations packed by shared/pack.wgsl.
//
// The product of quants is taken in whole numbers: an activation is 16 bits, two
// bytes that meet the quants in `dot4I8Packed`. It is exact but for the
// activations' rounding, 1 / 65,024 of the largest of each 16.
// Plain formats meet the activations as f32.

struct Pieces {
    // The first plane's first vec4.
    base: u32,
    // Blocks of the whole matrix, and of one row.
    blocks: u32,
    row_blocks: u32,
    // Pieces of one row.
    pieces: u32,
    format: u32,
}

const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;
const Q4_K: u32 = 3u;
const Q5_K: u32 = 4u;
const Q6_K: u32 = 5u;
const Q8_0: u32 = 6u;
const Q5_0: u32 = 7u;

// Whether f16s are put together by hand: an adapter may lose subnormals (kernels/halves.wgsl).
override by_hand: bool = true;

// An f16 from the low 16 bits, exactly: subnormals are kept, as the scales of
// fine-grained formats need. Not for infinities.
fn half_bits(bits: u32) -> f32 {
    if (!by_hand) {
        return unpack2x16float(bits).x;
    }
    let normal = bitcast<f32>(((bits & 0x7fffu) << 13u) + 0x38000000u);
    let small = f32(bits & 0x3ffu) * 0x1p-24f;
    let magnitude = select(normal, small, (bits & 0x7c00u) == 0u);
    return select(magnitude, -magnitude, (bits & 0x8000u) != 0u);
}

// Word `i` of the planes that begin at vec4 `plane`.
fn word_at(plane: u32, i: u32) -> u32 {
    return weights[plane + (i >> 2u)][i & 3u];
}

// Half-word `i` of the plane that begins at vec4 `plane`.
fn half_at(plane: u32, i: u32) -> f32 {
    return half_bits((word_at(plane, i >> 1u) >> (16u * (i & 1u))) & 0xffffu);
}

// What meets item `i` of a row. Of packed activations: high and low bytes of the first
// sixteen and of the second; their scales (x, y) and their sums (z, w). Of plain ones:
// their bits, in `high` and (eight of them) `high2`.
struct Acts { high: vec4<u32>, high2: vec4<u32>, low: vec4<u32>, low2: vec4<u32>, sums: vec4<f32> }

fn dot16(q: vec4<u32>, high: vec4<u32>, low: vec4<u32>) -> f32 {
    let h = dot4I8Packed(q.x, high.x) + dot4I8Packed(q.y, high.y)
        + dot4I8Packed(q.z, high.z) + dot4I8Packed(q.w, high.w);
    let l = dot4I8Packed(q.x, low.x) + dot4I8Packed(q.y, low.y)
        + dot4I8Packed(q.z, low.z) + dot4I8Packed(q.w, low.w);
    return f32(h * 256 + l);
}

// The products of a piece's two halves.
fn halves(first: vec4<u32>, second: vec4<u32>, a: Acts) -> vec2<f32> {
    return vec2<f32>(dot16(first, a.high, a.low), dot16(second, a.high2, a.low2)) * a.sums.xy;
}

const NIBBLES: vec4<u32> = vec4<u32>(0x0f0f0f0fu);
const ONES: vec4<u32> = vec4<u32>(0x01010101u);

// Scales (x, y) and minimums (z, w) of sub-blocks 2 c and 2 c + 1 in the 16 bytes
// f16 d, f16 dmin, 12 bytes of 6-bit pairs. Source: ggml-quants.c, get_scale_min_k4.
fn k_scales(m: vec4<u32>, c: u32) -> vec4<f32> {
    let shift = 16u * (c & 1u);
    let a = m.y >> shift;
    let b = m.z >> shift;
    let q = m.w >> shift;
    let late = c >= 2u;
    let s = select(a & 0x3f3fu, (q & 0x0f0fu) | ((a >> 2u) & 0x3030u), late);
    let l = select(b & 0x3f3fu, ((q >> 4u) & 0x0f0fu) | ((b >> 2u) & 0x3030u), late);
    let d = half_bits(m.x & 0xffffu);
    let low = half_bits(m.x >> 16u);
    return vec4<f32>(d * f32(s & 0xffu), d * f32((s >> 8u) & 0xffu), low * f32(l & 0xffu), low * f32((l >> 8u) & 0xffu));
}

fn q4_k(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    let b = row * m.row_blocks + (i >> 3u);
    let w = weights[m.base + b * 8u + (i & 7u)];
    let s = k_scales(weights[m.base + m.blocks * 8u + b], (i & 7u) >> 1u);
    let d = halves(w & NIBBLES, (w >> vec4<u32>(4u)) & NIBBLES, a);
    return s.x * d.x + s.y * d.y - s.z * a.sums.z - s.w * a.sums.w;
}

// The fifth bits of a piece: of its first sixteen, of its second.
fn fifths(f: u32) -> array<vec4<u32>, 2> {
    let low = (vec4<u32>(f) >> vec4<u32>(0u, 1u, 2u, 3u)) & ONES;
    let high = (vec4<u32>(f) >> vec4<u32>(4u, 5u, 6u, 7u)) & ONES;
    return array<vec4<u32>, 2>(low << vec4<u32>(4u), high << vec4<u32>(4u));
}

fn q5_k(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    let b = row * m.row_blocks + (i >> 3u);
    let w = weights[m.base + b * 8u + (i & 7u)];
    let f = fifths(weights[m.base + m.blocks * 8u + b * 2u + ((i & 7u) >> 2u)][i & 3u]);
    let s = k_scales(weights[m.base + m.blocks * 10u + b], (i & 7u) >> 1u);
    let d = halves((w & NIBBLES) | f[0], ((w >> vec4<u32>(4u)) & NIBBLES) | f[1], a);
    return s.x * d.x + s.y * d.y - s.z * a.sums.z - s.w * a.sums.w;
}

fn q6_k(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
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
    let p = halves((w & NIBBLES) | first, ((w >> vec4<u32>(4u)) & NIBBLES) | second, a);
    let s = vec2<f32>(f32(bitcast<i32>(scales << 24u) >> 24u), f32(bitcast<i32>(scales << 8u) >> 24u));
    // Quants stand for q - 32.
    let t = s * (p - 32.0 * a.sums.zw);
    return d * (t.x + t.y);
}

fn q8_0(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    // Blocks of 32: as many a row as pieces.
    let at = row * m.row_blocks + i;
    let p = halves(weights[m.base + at * 2u], weights[m.base + at * 2u + 1u], a);
    let d = word_at(m.base + m.blocks * 2u, at >> 1u);
    return half_bits(d & 0xffffu) * p.x + half_bits(d >> 16u) * p.y;
}

fn q5_0(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    let at = row * m.row_blocks + i;
    let w = weights[m.base + at];
    let f = fifths(word_at(m.base + m.blocks, at));
    let p = halves((w & NIBBLES) | f[0], ((w >> vec4<u32>(4u)) & NIBBLES) | f[1], a);
    let d = word_at(m.base, m.blocks * 5u + (at >> 1u));
    return half_bits(d & 0xffffu) * (p.x - 16.0 * a.sums.z) + half_bits(d >> 16u) * (p.y - 16.0 * a.sums.w);
}

// Eight weights; `i` counts vec4s of the row.
fn f16_eight(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    let w = weights[m.base + row * m.row_blocks * 4u + i];
    let first = vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
    let second = vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w));
    return dot(first, bitcast<vec4<f32>>(a.high)) + dot(second, bitcast<vec4<f32>>(a.high2));
}

// A bf16 is the upper half of an f32.
fn bf16_eight(m: Pieces, row: u32, i: u32, acts: Acts) -> f32 {
    let w = weights[m.base + row * m.row_blocks * 4u + i];
    let even = bitcast<vec4<f32>>(w << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
    let a = bitcast<vec4<f32>>(acts.high);
    let b = bitcast<vec4<f32>>(acts.high2);
    return dot(even, vec4<f32>(a.xz, b.xz)) + dot(odd, vec4<f32>(a.yw, b.yw));
}

fn f32_four(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    return dot(bitcast<vec4<f32>>(weights[m.base + row * m.row_blocks * 8u + i]), bitcast<vec4<f32>>(a.high));
}

// `format_of` (shared/format_*.wgsl) is a constant in a kernel made for one format: the
// choices below then cost nothing.

// Items of a row: pieces, or vec4s of plain weights.
fn items(m: Pieces) -> u32 {
    var count = m.pieces;
    switch format_of(m) {
        case F16, BF16: {
            count = m.row_blocks * 4u;
        }
        case F32: {
            count = m.row_blocks * 8u;
        }
        default: {
        }
    }
    return min(count, arrayLength(&weights));
}

fn acts(m: Pieces, at: u32, i: u32) -> Acts {
    let none = vec4<u32>(0u);
    let plain = at + 5u * m.pieces;
    switch format_of(m) {
        case F16, BF16: {
            return Acts(x[plain + 2u * i], x[plain + 2u * i + 1u], none, none, vec4<f32>(0.0));
        }
        case F32: {
            return Acts(x[plain + i], none, none, none, vec4<f32>(0.0));
        }
        default: {
            let j = at + i;
            return Acts(x[j], x[j + m.pieces], x[j + 2u * m.pieces], x[j + 3u * m.pieces],
                bitcast<vec4<f32>>(x[j + 4u * m.pieces]));
        }
    }
}

fn item(m: Pieces, row: u32, i: u32, a: Acts) -> f32 {
    switch format_of(m) {
        case Q4_K: {
            return q4_k(m, row, i, a);
        }
        case Q5_K: {
            return q5_k(m, row, i, a);
        }
        case Q6_K: {
            return q6_k(m, row, i, a);
        }
        case Q8_0: {
            return q8_0(m, row, i, a);
        }
        case Q5_0: {
            return q5_0(m, row, i, a);
        }
        case F16: {
            return f16_eight(m, row, i, a);
        }
        case BF16: {
            return bf16_eight(m, row, i, a);
        }
        default: {
            return f32_four(m, row, i, a);
        }
    }
}

// One invocation's share of row `r` of `m`: items `first`, `first + step` and so on, times
// the activations at `at`.
fn one_row(m: Pieces, r: u32, at: u32, first: u32, step: u32) -> f32 {
    var sum = 0.0;
    let end = items(m);
    for (var i = first; i < end; i += step) {
        sum += item(m, r, i, acts(m, at, i));
    }
    return sum;
}

// As `one_row`, for rows `r` and `s`.
fn two_rows(m: Pieces, r: u32, s: u32, at: u32, first: u32, step: u32) -> vec2<f32> {
    var sum = vec2<f32>(0.0);
    let end = items(m);
    for (var i = first; i < end; i += step) {
        let a = acts(m, at, i);
        sum += vec2<f32>(item(m, r, i, a), item(m, s, i, a));
    }
    return sum;
}

// As `one_row`, for rows `r` and `s` of `m` and of `n`, which is of the same shape and format.
fn four_rows(m: Pieces, n: Pieces, r: u32, s: u32, at: u32, first: u32, step: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    let end = items(m);
    for (var i = first; i < end; i += step) {
        let a = acts(m, at, i);
        sum += vec4<f32>(item(m, r, i, a), item(m, s, i, a), item(n, r, i, a), item(n, s, i, a));
    }
    return sum;
}
