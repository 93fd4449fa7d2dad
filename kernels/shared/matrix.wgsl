// A weight matrix repacked for the device (src/infer/quant/planes.rs): planes of u32 words in
// `weights`, one after the other, each with its part of every block. All formats are read in units
// of 32 consecutive weights of a row. A format file defines `Unit`, `unit_at(matrix, row, unit)`
// and `quad(unit, i)`, which returns weights 4i .. 4i+4 of the unit, for i < 8.

//!include shared/matrix_struct.wgsl

// Unpacks an f16 from the low 16 bits, exactly: subnormals are kept, because the scales of
// fine-grained formats need them. Not for infinities.
fn half_bits(bits: u32) -> f32 {
    let exponent = (bits >> 10u) & 31u;
    let normal = bitcast<f32>(((bits & 0x7fffu) << 13u) + 0x38000000u);
    let small = f32(bits & 0x3ffu) * 0x1p-24f;
    let magnitude = select(normal, small, exponent == 0u);
    return select(magnitude, -magnitude, (bits & 0x8000u) != 0u);
}

// Half-word `index` of a plane that begins at word `plane`.
fn half_at(plane: u32, index: u32) -> f32 {
    return half_bits((weights[plane + index / 2u] >> (16u * (index % 2u))) & 0xffffu);
}

// The four bytes of a word, lowest first.
fn bytes_of(word: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
}
