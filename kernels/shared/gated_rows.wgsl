// act(gate . x) * (up . x) of 16 rows, computed by a workgroup of eight teams with two rows each,
// and packed for the product that follows. `joined` is in shared/joined.wgsl or its variant.
//!include shared/pack.wgsl

var<workgroup> outs: array<vec4<f32>, 4>;

// Rows 16 t .. 16 t + 16 of `rows` times the activations at vec4 `x_at`, with zeros past the last, packed into the vector of `pieces`
// pieces at vec4 `at`. Must be reached by the whole workgroup.
fn gated_rows(gate: Pieces, up: Pieces, rows: u32, activation: u32, expert: u32, x_at: u32, t: u32, at: u32, pieces: u32, local: u32) {
    let place = local / 32u;
    let row = 16u * t + place;
    let sums = four_rows(gate, up, min(row, rows - 1u), min(row + 8u, rows - 1u), x_at, local & 31u, 32u);
    let gate_first = sum32(sums.x, local);
    let gate_second = sum32(sums.y, local);
    let up_first = sum32(sums.z, local);
    let up_second = sum32(sums.w, local);
    if ((local & 31u) == 0u) {
        outs[place / 4u][place % 4u] = select(0.0, joined(gate_first, up_first, expert, row, activation), row < rows);
        outs[place / 4u + 2u][place % 4u] = select(0.0, joined(gate_second, up_second, expert, row + 8u, activation), row + 8u < rows);
    }
    workgroupBarrier();
    if (local < 4u && t < pieces * 2u) {
        pack16(at, pieces, t, array<vec4<f32>, 4>(outs[0], outs[1], outs[2], outs[3]), local);
    }
}
