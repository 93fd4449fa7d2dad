//! Fast unpackers: the same bits as `quant::dequantize`, written so that they
//! inline into a kernel's vector loop.
//!
//! Loops run over arrays of fixed length, 16 or 32 weights with one scale, which
//! the compiler turns into vectors; the reference readers go weight by weight.

use crate::store::DType;

/// Unpacks the start of a row, `out.len()` weights, from whole blocks.
#[inline(always)]
pub fn unpack(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
        DType::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        DType::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = half_to_f32(u16::from_le_bytes(*b));
            }
        }
        DType::Q4K => blocks::<144, 256>(bytes, out, |block, out| affine::<false>(block, out)),
        DType::Q5K => blocks::<176, 256>(bytes, out, |block, out| affine::<true>(block, out)),
        DType::Q6K => blocks::<210, 256>(bytes, out, q6_k),
        DType::Q8_0 => blocks::<34, 32>(bytes, out, q8_0),
        DType::Q5_0 => blocks::<22, 32>(bytes, out, q5_0),
    }
}

/// Block by block; of the last one only what fits in `out`.
#[inline(always)]
fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    read: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (whole, rest) = out.as_chunks_mut::<LEN>();
    for (block, out) in blocks.iter().zip(&mut *whole) {
        read(block, out);
    }
    if let Some(block) = blocks.get(whole.len()).filter(|_| !rest.is_empty()) {
        let mut last = [0.0; LEN];
        read(block, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// IEEE 754 half to single precision without a branch, so that loops of it vectorise.
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    // Re-biasing the exponent by a multiplication also normalises subnormals.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let infinite = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | infinite | sign)
}

#[inline(always)]
pub fn half_at(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Q4_K, and Q5_K with its 32 bytes of fifth bits: `w = d * scale * q - dmin * min`.
#[inline(always)]
fn affine<const FIFTH: bool>(block: &[u8], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (groups, _) = out.as_chunks_mut::<32>();
    let nibbles = &block[if FIFTH { 48 } else { 16 }..];
    let (nibbles, _) = nibbles.as_chunks::<32>();
    for (g, out) in groups.iter_mut().enumerate() {
        // Twelve bytes of six-bit scales and mins; the last four groups' are split.
        let (scale, min) = if g < 4 {
            (block[4 + g] & 63, block[8 + g] & 63)
        } else {
            let (s, m, low) = (block[g], block[4 + g], block[8 + g]);
            (low & 15 | s >> 6 << 4, low >> 4 | m >> 6 << 4)
        };
        let (a, b) = (d * f32::from(scale), dmin * f32::from(min));
        let (quants, shift) = (&nibbles[g / 2], 4 * (g % 2));
        for i in 0..32 {
            let mut q = quants[i] >> shift & 15;
            if FIFTH {
                q |= (block[16 + i] >> g & 1) << 4;
            }
            out[i] = a * f32::from(q) - b;
        }
    }
}

/// `w = d * scale * (q - 32)`: two halves of four quarters of 32, 16 weights a scale.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    let (low, _) = block.as_chunks::<16>();
    let (out, _) = out.as_chunks_mut::<16>();
    for (g, out) in out.iter_mut().enumerate() {
        // Group `g` of 16 weights: half, quarter, and which half of the quarter.
        let (half, quarter, side) = (g / 8, g / 2 % 4, g % 2);
        let low = &low[4 * half + 2 * (quarter % 2) + side];
        let high: &[u8; 16] = block[128 + 32 * half + 16 * side..].first_chunk().expect("in block");
        let scale = d * f32::from(block[192 + g].cast_signed());
        let (low_shift, high_shift) = (4 * (quarter / 2), 2 * quarter);
        for i in 0..16 {
            let q = low[i] >> low_shift & 15 | (high[i] >> high_shift & 3) << 4;
            out[i] = scale * (f32::from(q) - 32.0);
        }
    }
}

/// `w = d * q`, signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let quants: &[u8; 32] = block.last_chunk().expect("in block");
    for i in 0..32 {
        out[i] = d * f32::from(quants[i].cast_signed());
    }
}

/// `w = d * (q - 16)`, fifth bits in one word.
#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let nibbles: &[u8; 16] = block.last_chunk().expect("in block");
    let (low, high) = out.split_at_mut(16);
    for i in 0..16 {
        let fifths = (fifth >> i << 4 & 16, fifth >> (i + 16) << 4 & 16);
        low[i] = d * ((u32::from(nibbles[i] & 15) | fifths.0) as f32 - 16.0);
        high[i] = d * ((u32::from(nibbles[i] >> 4) | fifths.1) as f32 - 16.0);
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::infer::quant::dequantize;

    #[test]
    fn every_half_converts_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            let same = ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan());
            assert!(same, "half {bits:#06x}: {ours} against {theirs}");
        }
    }

    #[test]
    fn any_bytes_unpack_to_the_bits_the_reference_gives() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for dtype in DType::ALL {
            for _ in 0..200 {
                let cols = rng.random_range(1..700);
                let mut bytes = vec![0; dtype.row_bytes(cols)];
                rng.fill_bytes(&mut bytes);
                let (mut ours, mut theirs) = (vec![0.0; cols], vec![0.0; cols]);
                unpack(dtype, &bytes, &mut ours);
                dequantize(dtype, &bytes, cols, &mut theirs);
                for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                    let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                    assert!(same, "{dtype}, {cols} columns, column {i}: {a} against {b}");
                }
            }
        }
    }
}
