//! MXFP4 as gpt-oss is published: `NAME_blocks [.., rows, blocks, 16]` in U8 holds pairs of e2m1,
//! the even column low, and `NAME_scales [.., rows, blocks]` an E8M0 scale for 32 columns.
//! They are shown as one tensor `NAME_blocks [.., rows, cols]`, because without this format `NAME` is
//! stored transposed.

use super::float::{Floats, Numbers, e2m1, e8m0};
use super::parts::{self, Parts};
use super::{Found, wrong};
use crate::load::Result;
use crate::load::hf::HuggingFace;

/// Columns that share a scale, and the bytes that hold them.
const GROUP: u64 = 32;
const BYTES: u64 = 16;

struct Mxfp4 {
    name: String,
    groups: u64,
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
        let mxfp4 = Mxfp4 { name: name.clone(), groups: *groups };
        let dims = [outer, &[cols]].concat();
        let (stored, matrix) = Floats::new("MXFP4".into(), dims, GROUP, mxfp4);
        found.add(blocks.clone(), stored, [blocks, format!("{name}_scales")], matrix);
    }
    Ok(("MXFP4".to_owned(), found))
}

impl Numbers for Mxfp4 {
    fn numbers(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let name = format!("{}_blocks", self.name);
        let pairs = parts.rows(&name, BYTES * self.groups, first, count)?;
        Ok(pairs.into_iter().flat_map(|pair| [e2m1(pair), e2m1(pair >> 4)]).collect())
    }

    fn scales(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let scales = parts.rows(&format!("{}_scales", self.name), self.groups, first, count)?;
        Ok(scales.into_iter().map(e8m0).collect())
    }
}
