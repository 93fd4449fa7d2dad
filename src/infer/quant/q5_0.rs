//! Q5_0: 32 weights in 22 bytes: f16 `d`, a 32-bit word of fifth bits, 16 bytes
//! whose low nibbles are weights 0..16 and high nibbles 16..32;
//! `w = d * (level - 16)`, levels `0..32`.

use half::f16;

use super::fit::{fit_symmetric, importance, scale_f16, symmetric_levels};
use super::planes::{Plane, copy_pair, fifths_pair, nibbles_pair};
use super::{Format, Layout, MAGNITUDE_MAX, Scales, spread};
use crate::cpu::lanes::Lanes;
use crate::cpu::row_dot::products;
use crate::cpu::unpack::half_at;

pub struct Q5_0;

impl Format<32, 22> for Q5_0 {
    const LAYOUT: Layout = Layout {
        group: 32,
        levels: -16..16,
        values: &[],
        quants: 2..22,
        scales: Scales::Halves(&[0]),
        max: MAGNITUDE_MAX,
        error: 0.046,
        narrow: None,
    };

    fn read(block: &[u8; 22], out: &mut [f32; 32]) {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for (i, out) in out.iter_mut().enumerate() {
            let low = block[6 + i % 16] >> (4 * (i / 16)) & 15;
            let high = (fifth >> i & 1) as u8;
            *out = d * (f32::from(low | high << 4) - 16.0);
        }
    }

    fn write(weights: &[f32; 32]) -> [u8; 22] {
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

    fn planes() -> Vec<Plane> {
        vec![nibbles_pair(22, 6), fifths_pair(22, 2), copy_pair(22, 0, 2)]
    }

    fn random(std: f32) -> Vec<f32> {
        vec![std / spread(32.0)]
    }

    #[inline(always)]
    fn unpack(block: &[u8; 22], out: &mut [f32; 32]) {
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

    #[inline(always)]
    fn dot<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
        let mut acc = l.splat(0.0);
        for (block, x) in row.as_chunks::<22>().0.iter().zip(x.as_chunks::<32>().0) {
            let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
            let nibbles: &[u8; 16] = block.last_chunk().expect("in block");
            let mut q = [0_i8; 32];
            for i in 0..16 {
                let fifths = [(fifth >> i << 4 & 16) as u8, (fifth >> (i + 16) << 4 & 16) as u8];
                q[i] = (nibbles[i] & 15 | fifths[0]).cast_signed() - 16;
                q[i + 16] = (nibbles[i] >> 4 | fifths[1]).cast_signed() - 16;
            }
            acc = l.fma(l.splat(half_at(block, 0)), products(l, &q, x), acc);
        }
        l.sum(acc)
    }
}
