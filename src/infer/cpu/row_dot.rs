//! Inner products of stored rows with one vector or a few, without unpacking to f32 first.
//!
//! Formats with a sixteen-lane kernel go to `k_dot`. Others have a kernel of their own, which
//! multiplies a block's integers with `x` directly and their sum with the scale, or are unpacked
//! chunk by chunk.

use super::k_dot::{Folded, KDots, beside};
use super::lanes::{self, Kernel, Lanes};
use super::matrix::Matrix;
use super::wide;
use crate::quant::{Format, Visit, visit};
use doppler_store::DType;

/// Weights unpacked at a time if a type has no kernel of its own.
const CHUNK: usize = 256;

/// A vector prepared for any number of rows of the given types.
#[derive(Debug)]
pub struct Input {
    /// Padded with zeros to whole blocks of 256.
    x: Vec<f32>,
    pub(super) folded: Folded,
}

impl Input {
    pub fn new(x: &[f32], types: impl Iterator<Item = DType>) -> Self {
        let mut padded = Vec::with_capacity(x.len().next_multiple_of(256));
        padded.extend_from_slice(x);
        padded.resize(x.len().next_multiple_of(256), 0.0);
        Self { folded: Folded::new(&padded, types), x: padded }
    }
}

/// `outs[t][i] = weight[first + i] . x[t]`.
pub struct RowDots<'a> {
    pub inputs: &'a [Input],
    pub weight: Matrix<'a>,
    pub first: usize,
    /// One for each input, all of the same length.
    pub outs: Vec<&'a mut [f32]>,
}

impl<'a> RowDots<'a> {
    /// Runs on the machine's widest instructions that are used for the type.
    pub fn run(self) {
        match beside(self.weight.dtype) {
            Some(_) => wide::run(self.of_blocks()),
            None => lanes::run(self),
        }
    }

    fn of_blocks(self) -> KDots<'a> {
        let Self { inputs, weight, first, outs } = self;
        KDots { inputs, weight, first, outs }
    }
}

impl Kernel for RowDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        visit(self.weight.dtype, On(l, self));
    }
}

struct On<'a, L>(L, RowDots<'a>);

impl<L: Lanes> Visit for On<'_, L> {
    type Output = ();

    #[inline(always)]
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) {
        let Self(l, RowDots { inputs, weight, first, mut outs }) = self;
        for i in 0..outs.first().map_or(0, |out| out.len()) {
            let row = weight.row(first + i);
            for (input, out) in inputs.iter().zip(&mut outs) {
                out[i] = F::dot(l, row, &input.x);
            }
        }
    }
}

/// For formats without a kernel of their own: unpacks them chunk by chunk, in the cache.
#[inline(always)]
pub fn unpacked<F: Format<LEN, BYTES>, L: Lanes, const LEN: usize, const BYTES: usize>(
    l: L,
    row: &[u8],
    x: &[f32],
) -> f32 {
    let mut unpacked = [0.0; CHUNK];
    let mut acc = [l.splat(0.0); 4];
    for (row, x) in row.chunks(CHUNK / LEN * BYTES).zip(x.as_chunks::<CHUNK>().0) {
        let (whole, rest) = unpacked.split_at_mut(row.len() / BYTES * LEN);
        for (block, out) in row.as_chunks().0.iter().zip(whole.as_chunks_mut().0) {
            F::unpack(block, out);
        }
        rest.fill(0.0);
        for (w, x) in unpacked.as_chunks::<32>().0.iter().zip(x.as_chunks::<32>().0) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = l.fma(l.load(&eights(w)[i]), l.load(&eights(x)[i]), *acc);
            }
        }
    }
    l.sum(l.add(l.add(acc[0], acc[1]), l.add(acc[2], acc[3])))
}

/// A group in vectors of eight.
#[inline(always)]
pub fn eights<T, const N: usize>(of: &[T; N]) -> &[[T; 8]] {
    of.as_chunks::<8>().0
}

/// Lane sums of `q . x`.
#[inline(always)]
pub fn products<L: Lanes, const N: usize>(l: L, q: &[i8; N], x: &[f32; N]) -> L::V {
    let (q, x) = (eights(q), eights(x));
    let mut sum = l.mul(l.signed(&q[0]), l.load(&x[0]));
    for i in 1..N / 8 {
        sum = l.fma(l.signed(&q[i]), l.load(&x[i]), sum);
    }
    sum
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::graph::MatrixSpec;
    use crate::quant::{dequantize, layout, quantize};

    /// Sets the scales of each block. With random bytes some would be infinite.
    fn set_scales(dtype: DType, bytes: &mut [u8], scale: f32) {
        let scales = layout(dtype).scales;
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            scales.write(block, &[scale; 2], 0);
        }
    }

    /// Rows of `dtype` with random bits that stand for finite numbers.
    fn stored(rng: &mut StdRng, dtype: DType, rows: usize, cols: usize, scale: f32) -> Vec<u8> {
        let mut bytes = vec![0; rows * dtype.row_bytes(cols)];
        if dtype.is_quantised() {
            rng.fill_bytes(&mut bytes);
        } else {
            let row: Vec<f32> =
                (0..rows * cols).map(|_| rng.random_range(-1.0..1.0) * scale).collect();
            bytes.clear();
            quantize(dtype, &row, &mut bytes).unwrap();
        }
        set_scales(dtype, &mut bytes, scale);
        bytes
    }

    /// Each row's product in f64, and the largest weight in its blocks times the sum of `|x|`,
    /// which shows how large the terms are even where they cancel.
    fn reference(matrix: Matrix<'_>, x: &[f32]) -> Vec<(f64, f64)> {
        let mut weights = vec![0.0; matrix.padded_cols()];
        let product = |row: usize, weights: &mut [f32]| {
            dequantize(matrix.dtype, matrix.row(row), weights.len(), weights);
            let pairs = weights.iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x)));
            let largest = weights.iter().fold(0.0_f32, |max, w| max.max(w.abs()));
            let dot = pairs.map(|(w, x)| w * x).sum();
            (dot, f64::from(largest) * x.iter().map(|x| f64::from(x.abs())).sum::<f64>())
        };
        (0..matrix.rows).map(|row| product(row, &mut weights)).collect()
    }

    fn rng() -> StdRng {
        let seed = rand::random();
        println!("seed {seed}");
        StdRng::seed_from_u64(seed)
    }

    /// The rows' products on each instruction set, the widest last.
    fn on_each(matrix: Matrix<'_>, x: &[f32]) -> Vec<(&'static str, Vec<f32>)> {
        let input = [Input::new(x, [matrix.dtype].into_iter())];
        let mut all = Vec::new();
        for instructions in ["arrays", "avx2", "avx512"] {
            let mut out = vec![f32::NAN; matrix.rows];
            let rows = RowDots { inputs: &input, weight: matrix, first: 0, outs: vec![&mut out] };
            let ran = match beside(matrix.dtype) {
                Some(_) => wide::run_on(instructions, rows.of_blocks()),
                None => lanes::run_on(instructions, rows),
            };
            if ran.is_some() {
                all.push((instructions, out));
            }
        }
        all
    }

    #[test]
    fn any_bytes_at_any_scale_give_the_product_on_every_set_of_instructions() {
        let mut rng = rng();
        // The smallest and the largest half, and x from far below one to far above.
        let scales =
            [(1.0, 1.0), (5.97e-8, 1e-20), (65504.0, 1e-20), (5.97e-8, 1e25), (65504.0, 1e25)];
        for dtype in DType::ALL {
            for (scale, size) in scales {
                for cols in [1, 31, 64, 256, 300, 777, 2048] {
                    let bytes = stored(&mut rng, dtype, 3, cols, scale);
                    let spec = MatrixSpec { dtype, rows: 3, cols, offset: 0 };
                    let matrix = Matrix::new(&spec, &bytes);
                    let x: Vec<f32> = (0..cols).map(|_| rng.random_range(-size..size)).collect();
                    let want = reference(matrix, &x);
                    for (instructions, out) in on_each(matrix, &x) {
                        for (row, (got, (want, most))) in out.iter().zip(&want).enumerate() {
                            let off = (f64::from(*got) - want).abs();
                            assert!(
                                off <= 3e-7 * most,
                                "{dtype} x {cols} on {instructions}, scale {scale}, x {size}, \
                                 row {row}: {got} for {want}, {:e} of the most",
                                off / most
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn avx512_and_avx2_agree_to_the_bit() {
        let mut rng = rng();
        for dtype in DType::ALL {
            for cols in [64, 777, 2048] {
                let bytes = stored(&mut rng, dtype, 5, cols, 0.01);
                let spec = MatrixSpec { dtype, rows: 5, cols, offset: 0 };
                let x: Vec<f32> = (0..cols).map(|_| rng.random_range(-1.0..1.0)).collect();
                let all = on_each(Matrix::new(&spec, &bytes), &x);
                let fused = all.iter().filter(|(name, _)| *name != "arrays");
                let bits: Vec<Vec<u32>> =
                    fused.map(|(_, out)| out.iter().map(|x| x.to_bits()).collect()).collect();
                assert!(bits.windows(2).all(|pair| pair[0] == pair[1]), "{dtype} x {cols}");
            }
        }
    }

    #[test]
    fn an_input_made_for_several_types_serves_each_as_one_made_for_it_alone() {
        let mut rng = rng();
        let x: Vec<f32> = (0..777).map(|_| rng.random_range(-1.0..1.0)).collect();
        let together = [Input::new(&x, DType::ALL.into_iter())];
        for dtype in DType::ALL {
            let bytes = stored(&mut rng, dtype, 4, 777, 0.5);
            let weight = Matrix::new(&MatrixSpec { dtype, rows: 4, cols: 777, offset: 0 }, &bytes);
            let alone = [Input::new(&x, [dtype].into_iter())];
            let mut outs = [[f32::NAN; 4]; 2];
            for (inputs, out) in [&together, &alone].into_iter().zip(&mut outs) {
                RowDots { inputs, weight, first: 0, outs: vec![out] }.run();
            }
            assert_eq!(outs[0].map(f32::to_bits), outs[1].map(f32::to_bits), "{dtype}");
        }
    }
}
