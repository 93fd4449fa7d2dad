// F32: one plane, 32 words a unit.

//!section units
struct Unit { at: u32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    return Unit(m.base + (row * m.row_blocks + unit) * 32u);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let at = u.at + i * 4u;
    return bitcast<vec4<f32>>(vec4<u32>(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u]));
}

//!section pieces
fn taken_f32(m: Pieces, row: u32, i: u32) -> Taken {
    return Taken(weights[m.base + row * m.row_blocks * 8u + i], vec4<u32>(0u), vec4<f32>(0.0));
}

fn times_f32(t: Taken, a: Acts) -> f32 {
    return dot(bitcast<vec4<f32>>(t.first), bitcast<vec4<f32>>(a.high));
}
