//! Fast unpackers: the same bits as `quant::dequantize`, written so that they
//! inline into a kernel's vector loop.
//!
//! Loops run over arrays of fixed length, 16 or 32 weights with one scale, which
//! the compiler turns into vectors; the reference readers go weight by weight.

use doppler_store::DType;

/// Runs a reader over whole blocks. A macro, so that the reader is inlined where
/// it stands: as a function of its own it would be compiled without vectors.
macro_rules! each_block {
    ($bytes:expr, $out:expr, $read:expr) => {
        for (block, out) in $bytes.as_chunks().0.iter().zip($out.as_chunks_mut().0) {
            $read(block, out);
        }
    };
}

/// Unpacks whole blocks: `out.len()` weights, a multiple of the block's length.
#[inline(always)]
pub fn unpack(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(out.len() % dtype.block_len(), 0);
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
        DType::Q4K => each_block!(bytes, out, affine::<false, 144>),
        DType::Q5K => each_block!(bytes, out, affine::<true, 176>),
        DType::Q6K => each_block!(bytes, out, q6_k),
        DType::Q8_0 => each_block!(bytes, out, q8_0),
        DType::Q5_0 => each_block!(bytes, out, q5_0),
    }
}

/// IEEE 754 half to single precision without a branch, so that loops of it vectorise.
///
/// No step works on a subnormal f32: each would cost some processors over a hundred cycles, and
/// Q6_K's scales are subnormal halves in most models.
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    let moved = magnitude << 13;
    // A subnormal half is a fraction of the least normal one, 2^-14.
    let least = f32::from_bits(113 << 23);
    let subnormal = (f32::from_bits(moved + (113 << 23)) - least).to_bits();
    let rebiased = if magnitude < 0x400 { subnormal } else { moved + (112 << 23) };
    let infinite = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(rebiased | infinite | sign)
}

#[inline(always)]
pub fn half_at(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Q4_K, and Q5_K with its 32 bytes of fifth bits: `w = d * scale * q - dmin * min`.
///
/// Shifts are constants (a vector of bytes has no variable shift), so the fifth
/// bits move down by two from pair to pair. Q4_K goes through the same loops with
/// fifth bits of zero: without them the compiler unrolls before it vectorises, and
/// the product takes three times as long (4.3 against 1.5 G weights/s on one core).
#[inline(always)]
fn affine<const FIFTH: bool, const BYTES: usize>(block: &[u8; BYTES], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (nibbles, _) = block[if FIFTH { 48 } else { 16 }..].as_chunks::<32>();
    let mut fifth = [0; 32];
    if FIFTH {
        fifth.copy_from_slice(&block[16..48]);
    }
    for (pair, (quants, out)) in nibbles.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let ((a, b), (c, e)) = (scale_min(block, 2 * pair), scale_min(block, 2 * pair + 1));
        let (a, b, c, e) = (d * a, dmin * b, d * c, dmin * e);
        for i in 0..32 {
            let q = quants[i] & 15 | (fifth[i] & 1) << 4;
            low[i] = a * f32::from(q) - b;
        }
        for i in 0..32 {
            let q = quants[i] >> 4 | (fifth[i] & 2) << 3;
            high[i] = c * f32::from(q) - e;
        }
        if FIFTH {
            fifth.iter_mut().for_each(|bits| *bits >>= 2);
        }
    }
}

/// Scale and min of group `g`, six bits each in twelve bytes; those of the last
/// four groups are split.
#[inline(always)]
fn scale_min(block: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = if g < 4 {
        (block[4 + g] & 63, block[8 + g] & 63)
    } else {
        let (s, m, low) = (block[g], block[4 + g], block[8 + g]);
        (low & 15 | s >> 6 << 4, low >> 4 | m >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `w = d * scale * (q - 32)`: two halves of four quarters of 32, 16 weights a scale.
///
/// Levels are put together as bytes before any is converted: seven times as fast
/// as one loop that does both.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    let (rows, _) = block.as_chunks::<32>();
    let mut levels = [0; 256];
    for (half, levels) in levels.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low0, low1, high) = (&rows[2 * half], &rows[2 * half + 1], &rows[4 + half]);
        for i in 0..32 {
            levels[i] = low0[i] & 15 | (high[i] & 3) << 4;
            levels[32 + i] = low1[i] & 15 | (high[i] >> 2 & 3) << 4;
            levels[64 + i] = low0[i] >> 4 | (high[i] >> 4 & 3) << 4;
            levels[96 + i] = low1[i] >> 4 | (high[i] >> 6) << 4;
        }
    }
    let groups = levels.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0);
    for ((levels, out), scale) in groups.zip(&block[192..208]) {
        let scale = d * f32::from(scale.cast_signed());
        for i in 0..16 {
            out[i] = scale * (f32::from(levels[i]) - 32.0);
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
    use crate::quant::dequantize;

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
                let cols = rng.random_range(1..4) * 256;
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
