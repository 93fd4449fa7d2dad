//! Q4_K: 256 weights in 144 bytes: the 16-byte header of `affine`, then 128 bytes of nibbles. Of
//! each 64 weights, the low nibbles hold the first 32.

use super::affine::{Affine, GROUP, fit, header, random, scales_mins, unpack};
use super::planes::{Plane, copy};
use super::{Format, Layout, MAGNITUDE_MAX, Scales};
use crate::cpu::k_dot::{Beside, Folded};
use crate::cpu::lanes::Lanes;
use crate::cpu::wide::Wide;
use doppler_store::DType;

pub struct Q4K;

impl Format<256, 144> for Q4K {
    const LAYOUT: Layout = Layout {
        group: GROUP,
        levels: 0..16,
        values: &[],
        quants: 16..144,
        scales: Scales::Halves(&[0, 2]),
        max: MAGNITUDE_MAX,
        error: 0.082,
        narrow: Some(DType::Q5_0),
    };

    fn read(block: &[u8; 144], out: &mut [f32; 256]) {
        let (header, nibbles) =
            block.split_first_chunk().expect("a block is longer than its header");
        let groups = Affine::from_header(header).groups();
        for (pair, quants) in nibbles.chunks_exact(GROUP).enumerate() {
            let ((a0, b0), (a1, b1)) = (groups[2 * pair], groups[2 * pair + 1]);
            let (low, high) = out[64 * pair..64 * pair + 64].split_at_mut(GROUP);
            for ((&q, low), high) in quants.iter().zip(low).zip(high) {
                *low = a0 * f32::from(q & 15) - b0;
                *high = a1 * f32::from(q >> 4) - b1;
            }
        }
    }

    fn write(weights: &[f32; 256]) -> [u8; 144] {
        let (block, levels) = fit(weights, 15.0);
        let mut out = [0; 144];
        out[..16].copy_from_slice(&block.header());
        for (quants, levels) in out[16..].chunks_exact_mut(GROUP).zip(levels.chunks_exact(64)) {
            for (i, q) in quants.iter_mut().enumerate() {
                *q = levels[i] | levels[i + GROUP] << 4;
            }
        }
        out
    }

    /// The nibbles of a chunk of 64 weights are already in the order of two pieces.
    fn planes() -> Vec<Plane> {
        vec![copy(16, 128), copy(0, 16)]
    }

    fn random(std: f32) -> Vec<f32> {
        random(std, 16.0)
    }

    #[inline(always)]
    fn unpack(block: &[u8; 144], out: &mut [f32; 256]) {
        unpack::<false, 144>(block, out);
    }

    #[inline(always)]
    fn unpack_lanes<L: Lanes>(l: L, block: &[u8; 144], out: &mut [f32; 256]) {
        let (scales, mins) = scales_mins(l, block);
        let mins = l.store(mins);
        let (quants, _) = block[16..].as_chunks::<8>();
        let (out, _) = out.as_chunks_mut::<8>();
        for pair in 0..4 {
            let (g, h) = (2 * pair, 2 * pair + 1);
            let scale = [l.splat(scales[g]), l.splat(scales[h])];
            let below = [l.splat(-mins[g]), l.splat(-mins[h])];
            for i in 0..4 {
                let numbers = l.nibbles(&quants[4 * pair + i]);
                for side in 0..2 {
                    let weights = l.add(l.mul(scale[side], numbers[side]), below[side]);
                    out[8 * pair + 4 * side + i] = l.store(weights);
                }
            }
        }
    }

    const WIDE: Option<Beside> = Some(Beside::Mins);

    #[inline(always)]
    fn wide_dot<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
        let mut acc = [w.splat16(0.0); 2];
        let blocks = row.as_chunks::<144>().0.iter().zip(input.x.as_chunks::<4>().0);
        for ((block, x), below) in blocks.zip(&input.below) {
            w.prefetch(block);
            let scales = w.scales_mins(header(block));
            acc[0] = w.fma16(scales, w.load16(below), acc[0]);
            let (quants, _) = block[16..].as_chunks::<32>();
            for pair in 0..4 {
                let q = w.right(w.twice(&quants[pair]), [0, 4]);
                let (low, high) = (2 * pair as u8, 2 * pair as u8 + 1);
                let scale = w.fours(scales, [low, low, high, high]);
                acc[pair % 2] = w.fma16(scale, w.dots(q, 0x0f, &x[pair]), acc[pair % 2]);
            }
        }
        w.sum16(w.add16(acc[0], acc[1]))
    }
}
