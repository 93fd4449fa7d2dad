//! Q5_0: 32 weights in 22 bytes: f16 `d`, a 32-bit word of fifth bits, 16 bytes
//! whose low nibbles are weights 0..16 and high nibbles 16..32;
//! `w = d * (level - 16)`, levels `0..32`.

use half::f16;

use super::fit::{fit_symmetric, importance, scale_f16, symmetric_levels};

pub fn read(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, out) in out.iter_mut().enumerate() {
        let low = block[6 + i % 16] >> (4 * (i / 16)) & 15;
        let high = (fifth >> i & 1) as u8;
        *out = d * (f32::from(low | high << 4) - 16.0);
    }
}

pub fn write(weights: &[f32; 32]) -> [u8; 22] {
    let d = scale_f16(fit_symmetric(weights, &importance(weights), 16.0));
    let step = d.to_f32();
    let levels =
        if step == 0.0 { [0.0; 32] } else { symmetric_levels(weights, step.recip(), 16.0) };
    let mut out = [0; 22];
    out[..2].copy_from_slice(&d.to_le_bytes());
    let mut fifth = 0_u32;
    for (i, signed) in levels.iter().enumerate() {
        let level = (signed + 16.0) as u8; // 0..32
        fifth |= u32::from(level >> 4) << i;
        out[6 + i % 16] |= (level & 15) << (4 * (i / 16));
    }
    out[2..6].copy_from_slice(&fifth.to_le_bytes());
    out
}
