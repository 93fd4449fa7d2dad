//! MXFP4 as gpt-oss is published: `NAME_blocks [.., rows, blocks, 16]` in U8 holds pairs of e2m1,
//! the even column low, and `NAME_scales [.., rows, blocks]` an E8M0 scale for 32 columns.
//! They are shown as one tensor `NAME_blocks [.., rows, cols]`, because without this format `NAME` is
//! stored transposed.
//!
//! Owns also how such pairs become the table's blocks, which hold columns `i` and `i + 16` in a byte.

use super::parts::{self, Parts};
use super::{Found, Matrix, wrong};
use crate::load::Result;
use crate::load::checkpoint::{Form, Stored};
use crate::load::hf::HuggingFace;
use doppler_store::DType;

/// Columns that share a scale, and the bytes that hold them.
const GROUP: u64 = 32;
const BYTES: u64 = 16;

/// A matrix whose pairs of neighbours are in one tensor and its scales in another.
pub struct Pairs {
    pub pairs: String,
    pub scales: String,
    /// Blocks of a row.
    pub groups: u64,
}

impl Pairs {
    /// The tensor that is shown, of this shape. Its rows are the table's blocks, bit for bit.
    pub const fn stored(shape: Vec<u64>) -> Stored {
        Stored { shape, form: Form::Blocks(DType::Mxfp4) }
    }
}

pub fn find(files: &HuggingFace) -> Result<(String, Found)> {
    let mut found = Found::default();
    let fail = |problem: String| wrong("NAME_blocks", problem);
    for name in parts::some(parts::modules(files, "_blocks"), "MXFP4", fail)? {
        let blocks = format!("{name}_blocks");
        let stored = parts::needed(files, &blocks)?;
        let [outer @ .., groups, BYTES] = &stored.shape[..] else {
            let problem = format!("its shape is {:?}, expected [.., 16]", stored.shape);
            return Err(wrong(&blocks, problem));
        };
        parts::expect(&blocks, stored, &["U8"], &stored.shape)?;
        let scales = [outer, &[*groups]].concat();
        parts::expect_part(files, &format!("{name}_scales"), &["U8"], &scales)?;
        let Some(cols) = groups.checked_mul(GROUP).filter(|cols| *cols > 0) else {
            return Err(wrong(&blocks, "it has no columns"));
        };
        let scales = format!("{name}_scales");
        let from = [blocks.clone(), scales.clone()];
        let pairs = Pairs { pairs: blocks.clone(), scales, groups: *groups };
        found.add(blocks, Pairs::stored([outer, &[cols]].concat()), from, pairs);
    }
    Ok(("MXFP4".to_owned(), found))
}

impl Matrix for Pairs {
    fn read(&self, parts: &Parts<'_>, first: u64, out: &mut [u8]) -> Result<()> {
        let block = DType::Mxfp4.block_bytes();
        let count = (out.len() / block) as u64 / self.groups;
        let pairs = parts.rows(&self.pairs, BYTES * self.groups, first, count)?;
        let scales = parts.rows(&self.scales, self.groups, first, count)?;
        let blocks = out.chunks_exact_mut(block).zip(pairs.as_chunks::<16>().0);
        for ((out, pairs), scale) in blocks.zip(scales) {
            let nibble = |column: usize| pairs[column / 2] >> (4 * (column % 2)) & 15;
            out[0] = scale;
            for (i, out) in out[1..].iter_mut().enumerate() {
                *out = nibble(i) | nibble(i + 16) << 4;
            }
        }
        Ok(())
    }
}
