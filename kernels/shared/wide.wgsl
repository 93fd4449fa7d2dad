// Unsigned 64-bit numbers, which WGSL lacks, as (low, high).

fn plus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn minus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// a * b in full.
fn product(a: u32, b: u32) -> vec2<u32> {
    let a_low = a & 0xffffu;
    let a_high = a >> 16u;
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    let lowest = a_low * b_low;
    let first = a_low * b_high + (lowest >> 16u);
    let second = a_high * b_low + (first & 0xffffu);
    let high = a_high * b_high + (first >> 16u) + (second >> 16u);
    return vec2<u32>((second << 16u) | (lowest & 0xffffu), high);
}

// a * b modulo 2^64.
fn product_low(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = product(a.x, b.x);
    return vec2<u32>(low.x, low.y + a.x * b.y + a.y * b.x);
}

// a * b / 2^64, rounded down.
fn product_high(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = product(a.x, b.x);
    let first = product(a.x, b.y);
    let second = product(a.y, b.x);
    let middle = plus(plus(vec2<u32>(low.y, 0u), vec2<u32>(first.x, 0u)), vec2<u32>(second.x, 0u));
    let carried = plus(vec2<u32>(first.y, 0u), plus(vec2<u32>(second.y, 0u), vec2<u32>(middle.y, 0u)));
    return plus(product(a.y, b.y), carried);
}
