// A weight matrix for products with one token: rows of pieces (src/infer/quant/planes.rs), read as
// vec4s from `weights`, times activations packed by shared/pack.wgsl.
//
// Products with quants are computed in integers: an activation has 16 bits, two bytes that are
// multiplied with the quants by `dot4I8Packed`. They are exact except for the activations'
// rounding, 1 / 65,024 of the largest of each 16. Plain formats are multiplied with f32
// activations.

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

//!include shared/words.wgsl

// The activations for item `i` of a row. For packed activations: high and low bytes of the first
// sixteen and of the second, their scales (x, y) and their sums (z, w). For plain ones: their bits,
// in `high`, if there are eight also `high2`, and if there are sixteen all four.
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

// An item of a row, loaded and unpacked: the quants of the first sixteen and of the second, and
// scales. For formats of which an item is a vec4: that, and a scale.
struct Taken { first: vec4<u32>, second: vec4<u32>, s: vec4<f32> }

// A format's file (kernels/formats) defines `taken_FORMAT(m, row, i)`, item `i` of the row, and
// `times_FORMAT(taken, acts)`, an item times its activations. The build adds `item`, which does
// both for the matrix's format, and `width_of`, the number of weights of an item: 32, or those of a
// vec4 for plain formats and FP8. Both are constant in a kernel made for one format.

// Items of a row: pieces, or vec4s of plain weights and of FP8's.
fn items(m: Pieces) -> u32 {
    var count = m.pieces;
    switch width_of(m) {
        case 16u: {
            count = m.pieces * 2u;
        }
        case 8u: {
            count = m.row_blocks * 4u;
        }
        case 4u: {
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
    switch width_of(m) {
        case 16u: {
            let first = plain + 4u * i;
            return Acts(x[first], x[first + 1u], x[first + 2u], x[first + 3u], vec4<f32>(0.0));
        }
        case 8u: {
            return Acts(x[plain + 2u * i], x[plain + 2u * i + 1u], none, none, vec4<f32>(0.0));
        }
        case 4u: {
            return Acts(x[plain + i], none, none, none, vec4<f32>(0.0));
        }
        default: {
            let j = at + i;
            return Acts(x[j], x[j + m.pieces], x[j + 2u * m.pieces], x[j + 3u * m.pieces],
                bitcast<vec4<f32>>(x[j + 4u * m.pieces]));
        }
    }
}

// One invocation's part of row `r` of `m`: items `first`, `first + step` and so on, times the
// activations at `at`.
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

// As `one_row`, for rows `r` and `s` of `m` and of `n`, which has the same shape and format.
fn four_rows(m: Pieces, n: Pieces, r: u32, s: u32, at: u32, first: u32, step: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    let end = items(m);
    for (var i = first; i < end; i += step) {
        let a = acts(m, at, i);
        sum += vec4<f32>(item(m, r, i, a), item(m, s, i, a), item(n, r, i, a), item(n, s, i, a));
    }
    return sum;
}
