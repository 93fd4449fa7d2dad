//! The f16s below 2^-14, `[1024]`, as an adapter should unpack them.

pub fn halves() -> Vec<f32> {
    (0..1024_u16).map(|bits| half::f16::from_bits(bits).to_f32()).collect()
}
