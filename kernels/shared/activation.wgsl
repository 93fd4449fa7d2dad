// The activation of a feed-forward, or of its gate: 0 is SiLU, 1 the tanh approximation of GELU,
// 2 GELU, 3 the square of ReLU, 4 tanh, 5 the sigmoid.
fn activate(value: f32, kind: u32) -> f32 {
    if (kind == 5u) {
        return 1.0 / (1.0 + exp(-value));
    }
    if (kind == 0u) {
        return value / (1.0 + exp(-value));
    }
    if (kind == 2u) {
        return 0.5 * value * (1.0 + erf(0.70710678 * value));
    }
    if (kind == 3u) {
        return max(value, 0.0) * value;
    }
    // tanh is flat beyond 15, and some drivers overflow in it.
    if (kind == 4u) {
        return tanh(clamp(value, -15.0, 15.0));
    }
    let inner = 0.7978845608 * (value + 0.044715 * value * value * value);
    return 0.5 * value * (1.0 + tanh(clamp(inner, -15.0, 15.0)));
}

// The error function, off by at most 1.5e-7 (Abramowitz and Stegun, 7.1.26).
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.3275911 * abs(x));
    let series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return sign(x) * (1.0 - series * exp(-min(x * x, 80.0)));
}
