//! Unblocked types: F32, F16 and BF16, little-endian. Narrowing rounds to the
//! nearest, ties to even.

use half::{bf16, f16};

use super::planes::{Plane, UNIT, copy};
use super::{Format, Layout};
use crate::cpu::unpack::half_to_f32;

pub struct F32;
pub struct F16;
pub struct Bf16;

impl Format<1, 4> for F32 {
    const LAYOUT: Layout = Layout::plain(f32::MAX);

    #[inline(always)]
    fn read(block: &[u8; 4], out: &mut [f32; 1]) {
        *out = [f32::from_le_bytes(*block)];
    }

    fn write(weights: &[f32; 1]) -> [u8; 4] {
        weights[0].to_le_bytes()
    }

    fn planes() -> Vec<Plane> {
        vec![copy(0, 4 * UNIT)]
    }

    fn random(_: f32) -> Vec<f32> {
        Vec::new()
    }
}

impl Format<1, 2> for F16 {
    /// The largest value that rounds to a finite one.
    const LAYOUT: Layout = Layout::plain(65_519.996);

    fn read(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [f16::from_le_bytes(*block).to_f32()];
    }

    fn write(weights: &[f32; 1]) -> [u8; 2] {
        f16::from_f32(weights[0]).to_le_bytes()
    }

    fn planes() -> Vec<Plane> {
        vec![copy(0, 2 * UNIT)]
    }

    fn random(_: f32) -> Vec<f32> {
        Vec::new()
    }

    #[inline(always)]
    fn unpack(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [half_to_f32(u16::from_le_bytes(*block))];
    }
}

impl Format<1, 2> for Bf16 {
    /// The largest value that rounds to a finite one.
    const LAYOUT: Layout = Layout::plain(3.396e38);

    fn read(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [bf16::from_le_bytes(*block).to_f32()];
    }

    fn write(weights: &[f32; 1]) -> [u8; 2] {
        bf16::from_f32(weights[0]).to_le_bytes()
    }

    fn planes() -> Vec<Plane> {
        vec![copy(0, 2 * UNIT)]
    }

    fn random(_: f32) -> Vec<f32> {
        Vec::new()
    }

    #[inline(always)]
    fn unpack(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16)];
    }
}
