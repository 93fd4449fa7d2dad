// cap * tanh(x / cap). Without a cap (0), and if it is not finite, x itself, so that an overflow does
// not look like a sound result.
fn softcapped(x: f32, cap: f32) -> f32 {
    if (cap == 0.0) {
        return x;
    }
    let t = x / cap;
    // Near 0 a difference of exponentials would lose leading bits. The series is off by 6e-8 there.
    let s = t * t;
    let near = t * (1.0 - s * (0.33333334 - s * (0.13333334 - s * 0.053968254)));
    // tanh is flat beyond 15, and some drivers overflow in it.
    let far = tanh(clamp(t, -15.0, 15.0));
    let finite = (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
    return select(x, cap * select(far, near, s < 0.04), finite);
}
