//! Q8_0: 32 weights in 34 bytes: f16 `d`, then 32 signed bytes; `w = d * q`.

use half::f16;

use super::fit::{round, scale_f16};

pub fn read(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q.cast_signed());
    }
}

/// The largest weight becomes +-127; at eight bits a search gains nothing.
pub fn write(weights: &[f32; 32]) -> [u8; 34] {
    let peak = weights.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    let d = scale_f16(peak / 127.0);
    let mut out = [0; 34];
    out[..2].copy_from_slice(&d.to_le_bytes());
    if d == f16::ZERO {
        return out; // a block of zeros
    }
    let inverse = d.to_f32().recip();
    for (out, x) in out[2..].iter_mut().zip(weights) {
        *out = (round((x * inverse).clamp(-127.0, 127.0)) as i8).cast_unsigned();
    }
    out
}
