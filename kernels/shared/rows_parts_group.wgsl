// Adds up one sum after another.
fn add_up(sums: Sums, local: u32) {
    var all = array<vec4<f32>, {most}>(
//!repeat t in {most}
        sums.s{t},
//!end
    );
    for (var i = 0u; i < 4u * {most}u; i++) {
        let sum = sum32(all[i / 4u][i % 4u], local);
        if ((local & 31u) == 0u) {
            parts[local / 32u * 4u * {most}u + i] = sum;
        }
    }
}
