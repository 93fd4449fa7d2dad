// Words and half-words of planes that are bound as vec4s in `weights` (src/infer/quant/planes.rs).

// Whether f16s are unpacked by hand, because an adapter may flush subnormals (kernels/halves.wgsl).
override by_hand: bool = true;

// Unpacks an f16 from the low 16 bits, exactly: subnormals are kept, because the scales of
// fine-grained formats need them. Not for infinities.
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

const NIBBLES: vec4<u32> = vec4<u32>(0x0f0f0f0fu);
const ONES: vec4<u32> = vec4<u32>(0x01010101u);

// The fifth bits of a piece's first sixteen, and of its second.
fn fifths(f: u32) -> array<vec4<u32>, 2> {
    let low = (vec4<u32>(f) >> vec4<u32>(0u, 1u, 2u, 3u)) & ONES;
    let high = (vec4<u32>(f) >> vec4<u32>(4u, 5u, 6u, 7u)) & ONES;
    return array<vec4<u32>, 2>(low << vec4<u32>(4u), high << vec4<u32>(4u));
}
