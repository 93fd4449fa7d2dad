// BF16: one plane, 16 words a unit. A bf16 is the upper half of an f32.

//!section units
struct Unit { at: u32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    return Unit(m.base + (row * m.row_blocks + unit) * 16u);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let at = u.at + i * 2u;
    let low = weights[at];
    let high = weights[at + 1u];
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}

//!section pieces
// A bf16 is the upper half of an f32.
fn taken_bf16(m: Pieces, row: u32, i: u32) -> Taken {
    return Taken(weights[m.base + row * m.row_blocks * 4u + i], vec4<u32>(0u), vec4<f32>(0.0));
}

fn times_bf16(t: Taken, acts: Acts) -> f32 {
    let w = t.first;
    let even = bitcast<vec4<f32>>(w << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
    let a = bitcast<vec4<f32>>(acts.high);
    let b = bitcast<vec4<f32>>(acts.high2);
    return dot(even, vec4<f32>(a.xz, b.xz)) + dot(odd, vec4<f32>(a.yw, b.yw));
}
