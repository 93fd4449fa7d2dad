//! Weight formats: conversion from and to f32, row by row, and whatever else depends on a block's
//! layout. Each format has a file.
//!
//! Owns the block layouts of ggml (`ggml-common.h`, little-endian), our own quantiser for each
//! (weighted least squares over candidate scales, then a refit of what the block stores: `fit`,
//! `affine`), how blocks become planes on a device (`planes`), and how the CPU multiplies them.
//! Refuses values that are not finite or too large for a format's f16 scale. The table of formats
//! is `doppler_store::formats`; each format implements [`Format`]. Invariant: a row is
//! `DType::row_bytes(cols)` bytes, its last block padded with zeros.

mod affine;
mod finite;
mod fit;
mod plain;
pub mod planes;
mod scales;
#[cfg(test)]
mod tests;

pub use finite::first_not_finite;
pub use scales::Scales;

use std::ops::Range;

use crate::cpu::k_dot::{Beside, Folded};
use crate::cpu::lanes::Lanes;
use crate::cpu::row_dot;
use crate::cpu::wide::Wide;
use doppler_store::DType;
use planes::Plane;

/// The largest weight that a quantized format accepts. Scales are f16, and no weight of a working
/// model comes near this.
pub const MAGNITUDE_MAX: f32 = 5e5;

/// What is known about a block, besides how to read it.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Weights that share a scale.
    pub group: usize,
    /// The integers as which weights are stored. In formats with a minimum they begin at 0.
    pub levels: Range<i32>,
    /// What the levels stand for, if not for themselves.
    pub values: &'static [f32],
    /// The bytes that hold the levels.
    pub quants: Range<usize>,
    pub scales: Scales,
    /// The largest magnitude that the format accepts.
    pub max: f32,
    /// The largest root mean square error of normally distributed weights, in standard deviations.
    pub error: f64,
    /// The format used instead for matrices whose rows are not whole blocks.
    pub narrow: Option<DType>,
}

/// Whether kernels multiply one token's weights of this format with activations as they are, not
/// rounded to integers: plain formats and FP8.
pub const fn meets_plain(dtype: DType) -> bool {
    !dtype.is_quantised() || matches!(dtype, DType::Fp8)
}

impl Layout {
    /// The layout of a type that stores each weight by itself.
    const fn plain(max: f32) -> Self {
        let (levels, values, quants, scales) = (0..0, &[], 0..0, Scales::Halves(&[]));
        Self { group: 1, levels, values, quants, scales, max, error: 0.01, narrow: None }
    }
}

/// A weight format: `LEN` weights in `BYTES` bytes.
///
/// What a new format must define comes first. The rest has defaults that are right for every
/// format. Some formats replace them for speed, without changing a bit of an unpacked weight.
pub trait Format<const LEN: usize, const BYTES: usize> {
    const LAYOUT: Layout;

    /// The weights of one block.
    fn read(block: &[u8; BYTES], out: &mut [f32; LEN]);

    /// The block for these weights, which are finite and at most [`Layout::max`].
    fn write(weights: &[f32; LEN]) -> [u8; BYTES];

    /// The planes of a matrix on a device, one after the other, widest first.
    fn planes() -> Vec<Plane>;

    /// Numbers for `LAYOUT.scales` that, with random bits everywhere else, give weights of mean
    /// about 0 and this standard deviation.
    fn random(std: f32) -> Vec<f32>;

    /// The same as [`Format::read`], bit by bit, written so that the compiler vectorises it.
    #[inline(always)]
    fn unpack(block: &[u8; BYTES], out: &mut [f32; LEN]) {
        Self::read(block, out);
    }

    /// The same as [`Format::unpack`], for use inside a tile, where the compiler does not vectorise
    /// loops.
    #[inline(always)]
    fn unpack_lanes<L: Lanes>(_: L, block: &[u8; BYTES], out: &mut [f32; LEN]) {
        Self::unpack(block, out);
    }

    /// A stored row times `x`, which is padded with zeros to whole blocks of 256.
    #[inline(always)]
    fn dot<L: Lanes>(l: L, row: &[u8], x: &[f32]) -> f32
    where
        Self: Sized,
    {
        row_dot::unpacked::<Self, L, LEN, BYTES>(l, row, x)
    }

    /// What [`Format::wide_dot`] reads besides `x`, if the format has such a kernel. Rows then go
    /// there.
    const WIDE: Option<Beside> = None;

    /// The same as [`Format::dot`], in sixteen lanes.
    #[inline(always)]
    fn wide_dot<W: Wide>(_: W, _: &[u8], _: &Folded) -> f32 {
        unreachable!("the format has no kernel of sixteen lanes")
    }
}

/// An operation on a format that is known only at run time.
pub trait Visit {
    type Output;
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) -> Self::Output;
}

/// Declares a module for each row of the table, and [`visit`], which picks a format.
macro_rules! declare {
    (
        plain { $($plain:ident $type:ident $pname:literal $prdrr:literal $plen:literal $pbytes:literal,)* }
        blocks { $($(#[$doc:meta])* $block:ident $file:ident $name:literal $rdrr:literal $len:literal $bytes:literal,)* }
    ) => {
        $(mod $file;)*

        /// Runs `what` on the format of `dtype`.
        #[inline(always)]
        pub fn visit<V: Visit>(dtype: DType, what: V) -> V::Output {
            match dtype {
                $(DType::$plain => what.visit::<plain::$plain, $plen, $pbytes>(),)*
                $(DType::$block => what.visit::<$file::$block, $len, $bytes>(),)*
            }
        }
    };
}

doppler_store::formats!(declare);

/// The layout of a format's blocks.
pub fn layout(dtype: DType) -> Layout {
    struct Of;
    impl Visit for Of {
        type Output = Layout;
        fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) -> Layout {
            F::LAYOUT
        }
    }
    visit(dtype, Of)
}

/// Numbers for a block's `scales` with which random bits give weights of this standard deviation.
pub fn random(dtype: DType, std: f32) -> Vec<f32> {
    struct Of(f32);
    impl Visit for Of {
        type Output = Vec<f32>;
        fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) -> Vec<f32> {
            F::random(self.0)
        }
    }
    visit(dtype, Of(std))
}

/// Standard deviation of integers drawn evenly from `count` consecutive ones.
fn spread(count: f32) -> f32 {
    ((count * count - 1.0) / 12.0).sqrt()
}

/// Why a row could not be quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    #[error("element {column} is {value}, which is not finite")]
    NotFinite { column: usize, value: f32 },
    #[error("element {column} is {value}, too large for {dtype}")]
    TooLarge { column: usize, value: f32, dtype: DType },
}

/// Writes the `cols` weights of one row of `bytes` into `out`.
///
/// # Panics
/// If `bytes` is not `dtype.row_bytes(cols)` long or `out` is not `cols` long. Shapes are checked
/// when a tensor is opened.
pub fn dequantize(dtype: DType, bytes: &[u8], cols: usize, out: &mut [f32]) {
    assert_eq!(bytes.len(), dtype.row_bytes(cols), "a {dtype} row of {cols}");
    assert_eq!(out.len(), cols, "the row's output");
    visit(dtype, Read { bytes, out });
}

struct Read<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Visit for Read<'_> {
    type Output = ();

    /// The last block may be partly padding.
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) {
        let (blocks, _) = self.bytes.as_chunks::<BYTES>();
        let (whole, rest) = self.out.as_chunks_mut::<LEN>();
        let last = blocks.get(whole.len());
        for (block, out) in blocks.iter().zip(whole) {
            F::read(block, out);
        }
        if let Some(block) = last {
            let mut padded = [0.0; LEN];
            F::read(block, &mut padded);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}

/// Appends one row in `dtype` to `out`: exactly `dtype.row_bytes(row.len())`
/// bytes, or nothing on an error.
pub fn quantize(dtype: DType, row: &[f32], out: &mut Vec<u8>) -> Result<(), QuantizeError> {
    visit(dtype, Write { dtype, row, out })
}

struct Write<'a> {
    dtype: DType,
    row: &'a [f32],
    out: &'a mut Vec<u8>,
}

impl Visit for Write<'_> {
    type Output = Result<(), QuantizeError>;

    /// The last block is padded with zeros.
    fn visit<F: Format<LEN, BYTES>, const LEN: usize, const BYTES: usize>(self) -> Self::Output {
        let Self { dtype, row, out } = self;
        for (column, &value) in row.iter().enumerate() {
            if !value.is_finite() {
                return Err(QuantizeError::NotFinite { column, value });
            }
            if value.abs() > F::LAYOUT.max {
                return Err(QuantizeError::TooLarge { column, value, dtype });
            }
        }
        let (whole, rest) = row.as_chunks::<LEN>();
        out.reserve(row.len().div_ceil(LEN) * BYTES);
        for weights in whole {
            out.extend_from_slice(&F::write(weights));
        }
        if !rest.is_empty() {
            let mut padded = [0.0; LEN];
            padded[..rest.len()].copy_from_slice(rest);
            out.extend_from_slice(&F::write(&padded));
        }
        Ok(())
    }
}
