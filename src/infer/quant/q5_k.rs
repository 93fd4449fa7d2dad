//! Q5_K: 256 weights in 176 bytes: the 16-byte header of `affine`, 32 bytes of
//! fifth bits (bit `g` of byte `i` belongs to weight `i` of group `g`), then
//! 128 bytes of nibbles laid out as in Q4_K.

use super::affine::{Affine, GROUP, fit, header, random, unpack};
use super::planes::{HALF, Move, Plane, copy, word};
use super::{Format, Layout, MAGNITUDE_MAX, Scales};
use crate::cpu::k_dot::{Beside, Folded};
use crate::cpu::wide::Wide;
use doppler_store::DType;

pub struct Q5K;

impl Format<256, 176> for Q5K {
    const LAYOUT: Layout = Layout {
        group: GROUP,
        levels: 0..32,
        values: &[],
        quants: 16..176,
        scales: Scales::Halves(&[0, 2]),
        max: MAGNITUDE_MAX,
        error: 0.042,
        narrow: Some(DType::Q5_0),
    };

    fn read(block: &[u8; 176], out: &mut [f32; 256]) {
        let (header, rest) = block.split_first_chunk().expect("a block is longer than its header");
        let (fifth, nibbles) = rest.split_at(GROUP);
        let groups = Affine::from_header(header).groups();
        for (g, (out, (a, b))) in out.chunks_exact_mut(GROUP).zip(groups).enumerate() {
            let quants = &nibbles[GROUP * (g / 2)..][..GROUP];
            for i in 0..GROUP {
                let low = quants[i] >> (4 * (g % 2)) & 15;
                let high = fifth[i] >> g & 1;
                out[i] = a * f32::from(low | high << 4) - b;
            }
        }
    }

    fn write(weights: &[f32; 256]) -> [u8; 176] {
        let (block, levels) = fit(weights, 31.0);
        let mut out = [0; 176];
        out[..16].copy_from_slice(&block.header());
        for (g, levels) in levels.chunks_exact(GROUP).enumerate() {
            for (i, level) in levels.iter().enumerate() {
                out[16 + i] |= (level >> 4) << g;
                out[48 + GROUP * (g / 2) + i] |= (level & 15) << (4 * (g % 2));
            }
        }
        out
    }

    /// Nibbles as in Q4_K. The fifth bits of chunk `c` of 64 weights are bits `2 c` (for its first
    /// 32) and `2 c + 1` of the stored bytes.
    fn planes() -> Vec<Plane> {
        let mut moves = Vec::new();
        for piece in 0..8 {
            let (chunk, half) = (piece / 2, piece % 2);
            for (second, k) in (0..8).map(|n| (n / 4, n % 4)) {
                let bit = 2 * chunk + second;
                moves.push(Move {
                    to: word(4 * piece),
                    from: word(16 + HALF * half + 4 * k),
                    bytes: 4,
                    mask: 1 << bit,
                    shift: (k + 4 * second) as i8 - bit as i8,
                });
            }
        }
        vec![copy(48, 128), Plane { bytes: 32, moves }, copy(0, 16)]
    }

    fn random(std: f32) -> Vec<f32> {
        random(std, 32.0)
    }

    #[inline(always)]
    fn unpack(block: &[u8; 176], out: &mut [f32; 256]) {
        unpack::<true, 176>(block, out);
    }

    const WIDE: Option<Beside> = Some(Beside::Mins);

    #[inline(always)]
    fn wide_dot<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
        let mut acc = [w.splat16(0.0); 2];
        let blocks = row.as_chunks::<176>().0.iter().zip(input.x.as_chunks::<4>().0);
        for ((block, x), below) in blocks.zip(&input.below) {
            w.prefetch(block);
            let scales = w.scales_mins(header(block));
            acc[0] = w.fma16(scales, w.load16(below), acc[0]);
            let (rows, _) = block[16..].as_chunks::<32>();
            let fifths = w.twice(&rows[0]);
            // A pair's fifth bits, shifted to their place.
            let fifths = [
                w.left(fifths, [4, 3]),
                w.left(fifths, [2, 1]),
                w.right(fifths, [0, 1]),
                w.right(fifths, [2, 3]),
            ];
            for pair in 0..4 {
                let q = w.and(w.right(w.twice(&rows[1 + pair]), [0, 4]), 0x0f0f_0f0f);
                let q = w.or(q, w.and(fifths[pair], 0x1010_1010));
                let (low, high) = (2 * pair as u8, 2 * pair as u8 + 1);
                let scale = w.fours(scales, [low, low, high, high]);
                acc[pair % 2] = w.fma16(scale, w.dots(q, 0x1f, &x[pair]), acc[pair % 2]);
            }
        }
        w.sum16(w.add16(acc[0], acc[1]))
    }
}
