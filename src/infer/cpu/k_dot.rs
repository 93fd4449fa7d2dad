//! Inner products of rows of Q4_K, Q5_K and Q6_K, the formats of most weights, in sixteen lanes.
//!
//! A block's integers are multiplied with `x` directly, and scales with sums of 16 or 32 products.
//! What is subtracted from every weight of a group (Q4_K's and Q5_K's mins, Q6_K's 32) is
//! multiplied with the sum of the group's `x`, which is computed once for all rows.
//!
//! Rows are read from memory once per token, one after another, so each kernel prefetches a page
//! ahead.

use super::matrix::Matrix;
use super::row_dot::Input;
use super::wide::{self, Wide};
use crate::quant::{Format, Visit, visit};
use doppler_store::DType;

/// What is subtracted from a group's weights and therefore multiplied with sums of `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// A min for each 32 weights (Q4_K, Q5_K).
    Mins,
    /// 32 levels, for each 16 weights (Q6_K).
    Centre,
}

/// What the format's sixteen-lane kernel subtracts, if there is such a kernel.
pub fn beside(dtype: DType) -> Option<Beside> {
    struct Of;
    impl Visit for Of {
        type Output = Option<Beside>;
        fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
            self,
        ) -> Self::Output {
            F::WIDE
        }
    }
    visit(dtype, Of)
}

/// What these kernels read instead of `x`. A part that no type needs is empty.
#[derive(Debug, Default)]
pub struct Folded {
    /// `[64 weights][byte][lane]`: weight `4 * lane + byte`, times 256^-byte (`wide`). Values below
    /// 2^-102 lose bits.
    pub x: Vec<[[f32; 16]; 4]>,
    /// A block's eight sums of 32, negated, in the lanes of its mins; zeros in the lanes of its
    /// scales.
    pub below: Vec<[f32; 16]>,
    /// A block's sixteen sums of 16, times -32.
    pub centre: Vec<[f32; 16]>,
}

impl Folded {
    /// `x` in whole blocks of 256, for rows of these types.
    pub fn new(x: &[f32], types: impl Iterator<Item = DType>) -> Self {
        let mut folded = Self::default();
        let blocks = x.len() / 256;
        for dtype in types {
            match beside(dtype) {
                Some(Beside::Mins) => folded.below.resize(blocks, [0.0; 16]),
                Some(Beside::Centre) => folded.centre.resize(blocks, [0.0; 16]),
                None => continue,
            }
            folded.x.resize(4 * blocks, [[0.0; 16]; 4]);
        }
        if !folded.x.is_empty() {
            wide::run(Fill { folded: &mut folded, x });
        }
        folded
    }
}

/// Computes what the types need.
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

/// `outs[t][i] = weight[first + i] . x[t]`, for the types named above.
pub struct KDots<'a> {
    pub inputs: &'a [Input],
    pub weight: Matrix<'a>,
    pub first: usize,
    /// One for each input, all of the same length.
    pub outs: Vec<&'a mut [f32]>,
}

impl wide::Kernel for KDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Wide>(self, w: W) {
        visit(self.weight.dtype, On(w, self));
    }
}

struct On<'a, W>(W, KDots<'a>);

impl<W: Wide> Visit for On<'_, W> {
    type Output = ();

    #[inline(always)]
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) {
        let Self(w, KDots { inputs, weight, first, mut outs }) = self;
        for i in 0..outs.first().map_or(0, |out| out.len()) {
            let row = weight.row(first + i);
            for (input, out) in inputs.iter().zip(&mut outs) {
                out[i] = F::wide_dot(w, row, &input.folded);
            }
        }
    }
}
