//! Unpacking whole blocks inside a kernel's vector loop: the same bits as `quant::dequantize`.
//!
//! The formats' own unpackers (`quant`) loop over arrays of fixed length, 16 or 32 weights with one
//! scale, which the compiler vectorises. The reference readers go weight by weight.

use crate::quant::{Format, Visit, visit};
use doppler_store::DType;

/// Unpacks whole blocks: `out.len()` weights, a multiple of the block's length.
#[inline(always)]
pub fn unpack(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(out.len() % dtype.block_len(), 0);
    visit(dtype, Unpack { bytes, out });
}

struct Unpack<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Visit for Unpack<'_> {
    type Output = ();

    /// Must be inlined: as a separate function it would be compiled without vector instructions.
    #[inline(always)]
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) {
        let (blocks, outs) = (self.bytes.as_chunks().0, self.out.as_chunks_mut().0);
        for (block, out) in blocks.iter().zip(outs) {
            F::unpack(block, out);
        }
    }
}

/// IEEE 754 half to single precision without a branch, so that loops of it vectorise.
///
/// No step uses a subnormal f32: each would cost some processors over a hundred cycles, and in most
/// models Q6_K's scales are subnormal halves.
#[inline(always)]
pub fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    let moved = magnitude << 13;
    // A subnormal half is a fraction of the smallest normal one, 2^-14.
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
