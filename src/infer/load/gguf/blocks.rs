//! Blocks of ggml's types that the format table lacks, in a type that it has. Every weight keeps
//! its value.
//!
//! Where a table format has the same groups and enough levels, the block stays quantised: Q4_0 is
//! Q4_1 with a minimum of -8 scales, IQ4_NL looks its 16 values up in a table of small integers
//! (Q8_0), Q3_K has the groups of Q6_K. The others are computed in F32 in ggml's order.
//! Layouts: `ggml-common.h`; formulas: `dequantize_row_*` in `ggml-quants.c`.

use half::f16;

/// Converts one block. `out` has exactly the bytes that it becomes.
///
/// # Errors
/// If a scale has no exact counterpart. No sensible model has one.
pub type Convert = fn(&[u8], &mut [u8]) -> Result<(), String>;

/// The values of IQ4_NL and IQ4_XS (`kvalues_iq4nl`).
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Weight `i` of 32 that are stored as 16 low nibbles, then 16 high ones.
const fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i % 16] >> (4 * (i / 16)) & 15
}

/// f16 d, 16 B of nibbles; `d * (q - 8)`.
pub fn q4_0(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    let minimum = f16::from_f32(-8.0 * half_at(block, 0));
    if !minimum.is_finite() {
        return Err(format!("its scale {} is too large", half_at(block, 0)));
    }
    out[..2].copy_from_slice(&block[..2]);
    out[2..4].copy_from_slice(&minimum.to_le_bytes());
    out[4..].copy_from_slice(&block[2..]);
    Ok(())
}

/// f16 d, 16 B of nibbles; `d * IQ4[q]`.
pub fn iq4_nl(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    out[..2].copy_from_slice(&block[..2]);
    for (i, out) in out[2..].iter_mut().enumerate() {
        *out = IQ4[usize::from(nibble(&block[2..], i))].cast_unsigned();
    }
    Ok(())
}

/// 32 B of third bits, 64 B of two low bits, 12 B of 6-bit scales, f16 d;
/// `d * (scale - 32) * (q - 4)`, 16 weights a scale.
pub fn q3_k(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    let (thirds, pairs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    out.fill(0);
    for (at, chunk) in (0..256).map(|at| (at, at / 128)) {
        // Within 128 weights, a byte holds one weight of each 32.
        let (row, byte) = (at % 128 / 32, at % 32);
        let low = pairs[32 * chunk + byte] >> (2 * row) & 3;
        let high = thirds[byte] >> (4 * chunk + row) & 1;
        // Levels of Q6_K are stored plus 32: q - 4 + 32.
        let level = (low | high << 2) + 28;
        out[64 * chunk + byte % 32 + 32 * (row % 2)] |= (level & 15) << (4 * (row / 2));
        out[128 + 32 * chunk + byte] |= (level >> 4) << (2 * row);
    }
    for (i, scale) in out[192..208].iter_mut().enumerate() {
        let low = scales[i % 8] >> (4 * (i / 8)) & 15;
        let high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
        *scale = (low | high << 4).wrapping_sub(32);
    }
    out[208..].copy_from_slice(&block[108..]);
    Ok(())
}

/// Writes weights as F32.
fn plain(out: &mut [u8], weight: impl Fn(usize) -> f32) -> Result<(), String> {
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *out = weight(i).to_le_bytes();
    }
    Ok(())
}

/// f16 d, f16 m, 4 B of fifth bits, 16 B of nibbles; `d * q + m`.
pub fn q5_1(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    plain(out, |i| {
        let level = u32::from(nibble(&block[8..], i)) | (fifth >> i & 1) << 4;
        d * level as f32 + m
    })
}

/// 16 B of 4-bit scales and mins, 64 B of two bits, f16 d, f16 dmin;
/// `d * scale * q - dmin * min`, 16 weights a scale.
pub fn q2_k(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    let (scales, pairs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    plain(out, |i| {
        let (scale, min) = (scales[i / 16] & 15, scales[i / 16] >> 4);
        let level = pairs[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3;
        d * f32::from(scale) * f32::from(level) - dmin * f32::from(min)
    })
}

/// f16 d, 2 B of two high bits a scale, 4 B of four low bits, 128 B of nibbles;
/// `d * (scale - 32) * IQ4[q]`, 32 weights a scale.
pub fn iq4_xs(block: &[u8], out: &mut [u8]) -> Result<(), String> {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    plain(out, |i| {
        let group = i / 32;
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let scale = i16::from(low) | (high >> (2 * group) & 3).cast_signed() << 4;
        let level = IQ4[usize::from(nibble(&block[8 + 16 * group..], i % 32))];
        d * f32::from(scale - 32) * f32::from(level)
    })
}
