//! Inner products of rows of Q4_K, Q5_K and Q6_K, what most weights are, in sixteen lanes.
//!
//! A block's whole numbers meet `x` as they are; scales multiply sums of 16 or 32, and what is
//! subtracted from every weight of a group (Q4_K's and Q5_K's mins, Q6_K's 32) multiplies the
//! sum of the group's `x`, taken once for all rows.
//!
//! Rows are read from memory once a token, one after another, so each kernel asks for what
//! lies a page ahead.

use super::matrix::Matrix;
use super::unpack::half_at;
use super::wide::{self, Wide};
use doppler_store::DType;

/// What these kernels read instead of `x`; empty where no type asks for it.
#[derive(Debug, Default)]
pub struct Folded {
    /// `[64 weights][byte][lane]`: weight `4 * lane + byte`, times 256^-byte (`wide`).
    /// What is below 2^-102 loses bits.
    x: Vec<[[f32; 16]; 4]>,
    /// A block's eight sums of 32, negated, in the lanes that hold its mins; zeros where it has scales.
    below: Vec<[f32; 16]>,
    /// A block's sixteen sums of 16, times -32.
    centre: Vec<[f32; 16]>,
}

impl Folded {
    /// `x` in whole blocks of 256, for rows of these types.
    pub fn new(x: &[f32], types: impl Iterator<Item = DType>) -> Self {
        let mut folded = Self::default();
        let blocks = x.len() / 256;
        for dtype in types {
            match dtype {
                DType::Q4K | DType::Q5K => folded.below.resize(blocks, [0.0; 16]),
                DType::Q6K => folded.centre.resize(blocks, [0.0; 16]),
                _ => continue,
            }
            folded.x.resize(4 * blocks, [[0.0; 16]; 4]);
        }
        if !folded.x.is_empty() {
            wide::run(Fill { folded: &mut folded, x });
        }
        folded
    }
}

/// Fills what the types ask for.
struct Fill<'a> {
    folded: &'a mut Folded,
    x: &'a [f32],
}

impl wide::Kernel for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Wide>(self, _: W) {
        let Self { x, folded: Folded { x: folded, below, centre } } = self;
        for (x, folded) in x.as_chunks::<64>().0.iter().zip(folded) {
            for lane in 0..16 {
                for k in 0..4 {
                    folded[k][lane] = x[4 * lane + k] * f32::from_bits((127 - 8 * k as u32) << 23);
                }
            }
        }
        for (i, x) in x.as_chunks::<256>().0.iter().enumerate() {
            let mut sums = [0.0; 16];
            for (sum, x) in sums.iter_mut().zip(x.as_chunks::<16>().0) {
                let mut lanes = [0.0; 8];
                for lane in 0..8 {
                    lanes[lane] = x[lane] + x[lane + 8];
                }
                for lane in 0..4 {
                    lanes[lane] += lanes[lane + 4];
                }
                *sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
            }
            if let Some(below) = below.get_mut(i) {
                for g in 0..8 {
                    below[8 + g] = -(sums[2 * g] + sums[2 * g + 1]);
                }
            }
            if let Some(centre) = centre.get_mut(i) {
                for g in 0..16 {
                    centre[g] = -32.0 * sums[g];
                }
            }
        }
    }
}

/// `out[i] = weight[first + i] . x`, for the types named above.
pub struct KDots<'a> {
    pub input: &'a Folded,
    pub weight: Matrix<'a>,
    pub first: usize,
    pub out: &'a mut [f32],
}

impl wide::Kernel for KDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Wide>(self, w: W) {
        let Self { input, weight, first, out } = self;
        let rows = (first..).map(|row| weight.row(row)).zip(out);
        match weight.dtype {
            DType::Q4K => rows.for_each(|(row, out)| *out = q4_k(w, row, input)),
            DType::Q5K => rows.for_each(|(row, out)| *out = q5_k(w, row, input)),
            DType::Q6K => rows.for_each(|(row, out)| *out = q6_k(w, row, input)),
            dtype => unreachable!("{dtype} has no kernel of sixteen lanes"),
        }
    }
}

/// The first bytes of a Q4_K or Q5_K block: `d`, `dmin`, scales and mins.
#[inline(always)]
fn header<const N: usize>(block: &[u8; N]) -> &[u8; 16] {
    block.first_chunk().expect("in block")
}

/// A Q6_K block's `d`, times its sixteen scales.
#[inline(always)]
fn q6_scales<W: Wide>(w: W, block: &[u8; 210]) -> W::W {
    let stored: &[u8; 16] = block[192..].first_chunk().expect("in block");
    w.scaled(bytemuck::cast_ref(stored), half_at(block, 208))
}

#[inline(always)]
fn q4_k<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
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

#[inline(always)]
fn q5_k<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
    let mut acc = [w.splat16(0.0); 2];
    let blocks = row.as_chunks::<176>().0.iter().zip(input.x.as_chunks::<4>().0);
    for ((block, x), below) in blocks.zip(&input.below) {
        w.prefetch(block);
        let scales = w.scales_mins(header(block));
        acc[0] = w.fma16(scales, w.load16(below), acc[0]);
        let (rows, _) = block[16..].as_chunks::<32>();
        let fifths = w.twice(&rows[0]);
        // A pair's fifth bits, moved to where they count.
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

/// The levels of half a Q6_K block, with the 32 that is to be taken from each: 64 and 64 bytes.
#[inline(always)]
fn q6_levels<W: Wide>(w: W, block: &[u8; 210], half: usize) -> [W::Words; 2] {
    let low = w.words(&block.as_chunks().0[half]);
    let high = w.twice(&block.as_chunks().0[4 + half]);
    let (four, two) = (0x0f0f_0f0f, 0x3030_3030);
    [
        w.or(w.and(low, four), w.and(w.left(high, [4, 2]), two)),
        w.or(w.and(w.right(low, [4, 4]), four), w.and(w.right(high, [0, 2]), two)),
    ]
}

#[inline(always)]
fn q6_k<W: Wide>(w: W, row: &[u8], input: &Folded) -> f32 {
    let mut acc = [w.splat16(0.0); 2];
    let blocks = row.as_chunks::<210>().0.iter().zip(input.x.as_chunks::<4>().0);
    for ((block, x), centre) in blocks.zip(&input.centre) {
        w.prefetch(block);
        let scales = q6_scales(w, block);
        acc[0] = w.fma16(scales, w.load16(centre), acc[0]);
        for half in 0..2 {
            let levels = q6_levels(w, block, half);
            for side in 0..2 {
                let chunk = 2 * half + side;
                let first = 4 * chunk as u8;
                let scale = w.fours(scales, [first, first + 1, first + 2, first + 3]);
                let sum = w.dots(levels[side], 0x3f, &x[chunk]);
                acc[side] = w.fma16(scale, sum, acc[side]);
            }
        }
    }
    w.sum16(w.add16(acc[0], acc[1]))
}
