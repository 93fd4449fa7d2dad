// F16: one plane, 16 words a unit.

struct Unit { at: u32 }

fn unit_at(m: Matrix, row: u32, unit: u32) -> Unit {
    return Unit(m.base + (row * m.row_blocks + unit) * 16u);
}

fn quad(u: Unit, i: u32) -> vec4<f32> {
    let at = u.at + i * 2u;
    return vec4<f32>(unpack2x16float(weights[at]), unpack2x16float(weights[at + 1u]));
}
