// The gate's activation: 0 is SiLU, 1 is the tanh approximation of GELU.
fn activate(value: f32, kind: u32) -> f32 {
    if (kind == 0u) {
        return value / (1.0 + exp(-value));
    }
    // tanh is flat beyond 15, and some drivers overflow in it.
    let inner = 0.7978845608 * (value + 0.044715 * value * value * value);
    return 0.5 * value * (1.0 + tanh(clamp(inner, -15.0, 15.0)));
}
