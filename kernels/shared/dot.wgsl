// The dot product of a unit and the 32 activations that begin at vec4 `at` of `x`. Activations past
// the row's width are zero (buffers are padded to whole units).
fn dot_unit(u: Unit, at: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < 8u; i++) {
        sum += dot(quad(u, i), x[at + i]);
    }
    return sum;
}
