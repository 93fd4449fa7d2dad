// F16: one plane, 16 words a unit.

//!section units
struct Unit { at: u32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    return Unit(m.base + (row * m.row_blocks + unit) * 16u);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let at = u.at + i * 2u;
    return vec4<f32>(unpack2x16float(weights[at]), unpack2x16float(weights[at + 1u]));
}

//!section pieces
// Eight weights; `i` counts vec4s of the row.
fn taken_f16(m: Pieces, row: u32, i: u32) -> Taken {
    return Taken(weights[m.base + row * m.row_blocks * 4u + i], vec4<u32>(0u), vec4<f32>(0.0));
}

fn times_f16(t: Taken, a: Acts) -> f32 {
    let w = t.first;
    let first = vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
    let second = vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w));
    return dot(first, bitcast<vec4<f32>>(a.high)) + dot(second, bitcast<vec4<f32>>(a.high2));
}
