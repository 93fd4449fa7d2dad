//! Q4_1: 32 weights in 20 bytes: f16 `d`, f16 `m`, 16 bytes whose low nibbles are weights 0..16 and
//! high nibbles 16..32; `w = d * level + m`, levels `0..16` (ggml's `block_q4_1`).

use super::fit::{affine_levels, fit_affine, importance, scale_f16};
use super::planes::{Plane, copy_pair, nibbles_pair};
use super::{Format, Layout, Scales, spread};
use crate::cpu::unpack::half_at;

pub struct Q4_1;

impl Format<32, 20> for Q4_1 {
    const LAYOUT: Layout = Layout {
        group: 32,
        levels: 0..16,
        values: &[],
        quants: 4..20,
        scales: Scales::Halves(&[0, 2]),
        // `m` is a weight itself.
        max: 65_504.0,
        error: 0.085,
        narrow: None,
    };

    #[inline(always)]
    fn read(block: &[u8; 20], out: &mut [f32; 32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let nibbles: &[u8; 16] = block.last_chunk().expect("in block");
        let (low, high) = out.split_at_mut(16);
        for i in 0..16 {
            low[i] = d * f32::from(nibbles[i] & 15) + m;
            high[i] = d * f32::from(nibbles[i] >> 4) + m;
        }
    }

    fn write(weights: &[f32; 32]) -> [u8; 20] {
        let (scale, low) = fit_affine(weights, &importance(weights), 15.0);
        let (d, m) = (scale_f16(scale), scale_f16(low));
        let step = d.to_f32();
        let inverse = if step == 0.0 { 0.0 } else { step.recip() };
        let levels = affine_levels(weights, m.to_f32(), inverse, 15.0);
        let mut out = [0; 20];
        out[..2].copy_from_slice(&d.to_le_bytes());
        out[2..4].copy_from_slice(&m.to_le_bytes());
        for (i, level) in levels.iter().enumerate() {
            out[4 + i % 16] |= (*level as u8) << (4 * (i / 16)); // 0..16
        }
        out
    }

    fn planes() -> Vec<Plane> {
        vec![nibbles_pair(20, 4), copy_pair(20, 0, 4)]
    }

    fn random(std: f32) -> Vec<f32> {
        let d = std / spread(16.0);
        vec![d, -7.5 * d]
    }
}
