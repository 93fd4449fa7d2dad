//! Q8_0: 32 weights in 34 bytes: f16 `d`, then 32 signed bytes; `w = d * q`.

use half::f16;

use super::fit::{round, scale_f16};
use super::planes::{Plane, bytes_pair, copy_pair};
use super::{Format, Layout, MAGNITUDE_MAX, Scales, spread};
use crate::cpu::lanes::Lanes;
use crate::cpu::row_dot::products;
use crate::cpu::unpack::half_at;

pub struct Q8_0;

impl Format<32, 34> for Q8_0 {
    const LAYOUT: Layout = Layout {
        group: 32,
        levels: -127..128,
        values: &[],
        quants: 2..34,
        scales: Scales::Halves(&[0]),
        max: MAGNITUDE_MAX,
        error: 0.006,
        narrow: None,
    };

    fn read(block: &[u8; 34], out: &mut [f32; 32]) {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        for (out, q) in out.iter_mut().zip(&block[2..]) {
            *out = d * f32::from(q.cast_signed());
        }
    }

    /// The largest weight becomes +-127. At eight bits a search gains nothing.
    fn write(weights: &[f32; 32]) -> [u8; 34] {
        let peak = weights.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        let d = scale_f16(peak / 127.0);
        let mut out = [0; 34];
        out[..2].copy_from_slice(&d.to_le_bytes());
        if d == f16::ZERO {
            return out; // a block of zeros
        }
        let inverse = d.to_f32().recip();
        for (out, x) in out[2..].iter_mut().zip(weights) {
            *out = (round((x * inverse).clamp(-127.0, 127.0)) as i8).cast_unsigned();
        }
        out
    }

    fn planes() -> Vec<Plane> {
        vec![bytes_pair(34, 2), copy_pair(34, 0, 2)]
    }

    fn random(std: f32) -> Vec<f32> {
        vec![std / spread(256.0)]
    }

    #[inline(always)]
    fn unpack(block: &[u8; 34], out: &mut [f32; 32]) {
        let d = half_at(block, 0);
        let quants: &[u8; 32] = block.last_chunk().expect("in block");
        for i in 0..32 {
            out[i] = d * f32::from(quants[i].cast_signed());
        }
    }

    #[inline(always)]
    fn dot<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32 {
        let mut acc = [l.splat(0.0); 2];
        let blocks = row.as_chunks::<34>().0.iter().zip(x.as_chunks::<32>().0);
        for (i, (block, x)) in blocks.enumerate() {
            let q: &[i8; 32] = bytemuck::cast_ref(block.last_chunk::<32>().expect("in block"));
            acc[i % 2] = l.fma(l.splat(half_at(block, 0)), products(l, q, x), acc[i % 2]);
        }
        l.sum(l.add(acc[0], acc[1]))
    }
}
