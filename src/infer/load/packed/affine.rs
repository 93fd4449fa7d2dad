//! Matrices of integer levels with a scale for each group of columns: `scale * (level - zero)`, or
//! `scale * level + bias`.
//!
//! Where the format table holds these values exactly, they stay levels: Q8_0 for a zero point
//! (levels minus zero points are its integers), Q4_1 for a bias (up to four bits). That needs
//! groups and rows of whole blocks, columns in order, and scales that are F16. Otherwise weights
//! are computed in F32.

use half::f16;

use super::super::Result;
use super::super::checkpoint::{Form, Stored};
use super::Matrix;
use super::parts::Parts;
use doppler_store::DType;

/// Weights of a block of Q8_0 and Q4_1.
const BLOCK: usize = 32;

/// Some rows of a matrix, unpacked.
#[derive(Default)]
pub struct Levels {
    /// A level for each weight. If there are zero points, they were subtracted.
    pub levels: Vec<i16>,
    /// A scale for each group of each row.
    pub scales: Vec<f32>,
    /// What is added, for each group of each row. Empty where there are zero points.
    pub biases: Vec<f32>,
}

/// How a method packs levels.
pub trait Unpack: Send + Sync {
    fn rows(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Levels>;
}

/// What is common to all methods.
#[derive(Debug, Clone)]
pub struct Shape {
    pub cols: u64,
    /// Columns of a group.
    pub group: u64,
    /// The group of each column, unless columns are in order.
    pub order: Option<Vec<u32>>,
}

/// A matrix of levels.
pub struct Affine<U> {
    shape: Shape,
    dtype: DType,
    unpack: U,
}

impl<U: Unpack> Affine<U> {
    /// `shape` is that of the whole tensor, `exact` the format that could hold it if scales (and
    /// biases) are F16, and levels in its range.
    pub fn new(
        what: String,
        dims: Vec<u64>,
        shape: Shape,
        exact: Option<DType>,
        unpack: U,
    ) -> (Stored, Self) {
        let block = BLOCK as u64;
        let whole = shape.cols.is_multiple_of(block)
            && (shape.group.is_multiple_of(block) || shape.group >= shape.cols);
        let exact = exact.filter(|_| whole && shape.order.is_none());
        let dtype = exact.unwrap_or(DType::F32);
        let stored = Stored { shape: dims, form: Form::Decoded { what, dtype } };
        (stored, Self { shape, dtype, unpack })
    }
}

impl<U: Unpack> Matrix for Affine<U> {
    fn read(&self, parts: &Parts<'_>, first: u64, out: &mut [u8]) -> Result<()> {
        let cols = self.shape.cols as usize;
        let row = self.dtype.row_bytes(cols);
        let count = out.len() / row;
        let Levels { levels, scales, biases } = self.unpack.rows(parts, first, count as u64)?;
        let groups = cols.div_ceil(self.shape.group as usize);
        for (number, (out, levels)) in
            out.chunks_exact_mut(row).zip(levels.chunks_exact(cols)).enumerate()
        {
            let own = number * groups..(number + 1) * groups;
            let scales = &scales[own.clone()];
            let biases = biases.get(own).unwrap_or(&[]);
            match self.dtype {
                DType::Q8_0 => self.q8_0(levels, scales, out),
                DType::Q4_1 => self.q4_1(levels, scales, biases, out),
                _ => self.f32(levels, scales, biases, out),
            }
        }
        Ok(())
    }
}

impl<U> Affine<U> {
    fn group(&self, column: usize) -> usize {
        match &self.shape.order {
            Some(order) => order[column] as usize,
            None => column / self.shape.group as usize,
        }
    }

    fn f32(&self, levels: &[i16], scales: &[f32], biases: &[f32], out: &mut [u8]) {
        let out = out.as_chunks_mut::<4>().0.iter_mut();
        for (column, (out, level)) in out.zip(levels).enumerate() {
            let group = self.group(column);
            let bias = biases.get(group).copied().unwrap_or(0.0);
            *out = (scales[group] * f32::from(*level) + bias).to_le_bytes();
        }
    }

    fn q8_0(&self, levels: &[i16], scales: &[f32], out: &mut [u8]) {
        let blocks = out.chunks_exact_mut(DType::Q8_0.block_bytes());
        for (number, (block, levels)) in blocks.zip(levels.chunks_exact(BLOCK)).enumerate() {
            let scale = scales[self.group(number * BLOCK)];
            block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            for (out, level) in block[2..].iter_mut().zip(levels) {
                *out = *level as i8 as u8; // -128..=127, checked when the matrix was found
            }
        }
    }

    fn q4_1(&self, levels: &[i16], scales: &[f32], biases: &[f32], out: &mut [u8]) {
        let blocks = out.chunks_exact_mut(DType::Q4_1.block_bytes());
        for (number, (block, levels)) in blocks.zip(levels.chunks_exact(BLOCK)).enumerate() {
            let group = self.group(number * BLOCK);
            block[..2].copy_from_slice(&f16::from_f32(scales[group]).to_le_bytes());
            block[2..4].copy_from_slice(&f16::from_f32(biases[group]).to_le_bytes());
            let (low, high) = levels.split_at(BLOCK / 2);
            for ((out, low), high) in block[4..].iter_mut().zip(low).zip(high) {
                *out = (low | high << 4) as u8; // levels of at most four bits
            }
        }
    }
}
