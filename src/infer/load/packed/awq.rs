//! AWQ's gemm form: `qweight [in, out / 8]` packs four-bit levels along the output, `qzeros
//! [groups, out / 8]` likewise, `scales [groups, out]`. The nibbles of a
//! word are its columns 0, 2, 4, 6, 1, 3, 5 and 7. Source: AutoAWQ 0.2 `packing_utils.py`.

use serde_json::json;

use super::affine::{Affine, Levels, Shape, Unpack};
use super::parts::{self, PLAIN, Parts};
use super::{Described, Found, wrong};
use crate::load::Result;
use crate::load::hf::HuggingFace;
use doppler_store::DType;

/// The nibble of each column.
const PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// Levels of a word.
const EACH: usize = 8;

struct Awq {
    module: String,
    ins: usize,
    outs: usize,
    group: usize,
    scale_type: String,
}

pub fn find(config: &Described<'_>, files: &HuggingFace) -> Result<(String, Found)> {
    config.only("version", &[json!("gemm"), json!("GEMM")])?;
    config.only("bits", &[json!(4)])?;
    config.only("w_bit", &[json!(4)])?;
    config.only("zero_point", &[json!(true)])?;
    let group = config.group_size(&["group_size", "q_group_size"])?;
    let modules = parts::modules(files, ".qweight");
    let mut found = Found::default();
    for module in parts::some(modules, "AWQ", |problem| config.fail(problem))? {
        one(files, &module, group, &mut found)?;
    }
    Ok(("AWQ_4BIT".to_owned(), found))
}

fn one(files: &HuggingFace, module: &str, group: Option<u64>, found: &mut Found) -> Result<()> {
    let name = |part: &str| format!("{module}.{part}");
    let qweight = parts::needed(files, &name("qweight"))?;
    let (ins, packed) = parts::matrix_shape(&name("qweight"), qweight)?;
    parts::expect(&name("qweight"), qweight, &["I32"], &[ins, packed])?;
    let outs = packed * EACH as u64;
    let group = group.unwrap_or(ins).min(ins);
    if !ins.is_multiple_of(group) {
        let problem = format!("its {ins} inputs are no whole groups of {group}");
        return Err(wrong(&name("qweight"), problem));
    }
    let groups = ins / group;
    parts::expect_part(files, &name("qzeros"), &["I32"], &[groups, packed])?;
    let scale_type = parts::expect_part(files, &name("scales"), PLAIN, &[groups, outs])?;
    let exact = parts::fits_f16(files, &name("scales"))?.then_some(DType::Q8_0);
    let what = format!("AWQ, 4 bits in groups of {group}");
    let shape = Shape { cols: ins, group, order: None };
    let awq = Awq {
        module: module.to_owned(),
        ins: ins as usize,
        outs: outs as usize,
        group: group as usize,
        scale_type,
    };
    let (stored, matrix) = Affine::new(what, vec![outs, ins], shape, exact, awq);
    found.add(name("weight"), stored, ["qweight", "qzeros", "scales"].map(name), matrix);
    Ok(())
}

/// Level `column` of a line of words.
fn level(line: &[u8], column: usize) -> i16 {
    let place = PLACES[column % EACH];
    let byte = line[column / EACH * 4 + place / 2];
    i16::from(byte >> (4 * (place % 2)) & 15)
}

impl Unpack for Awq {
    fn rows(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Levels> {
        let name = |part: &str| format!("{}.{part}", self.module);
        let (first, count) = (first as usize, count as usize);
        let &Self { ins, outs, group, .. } = self;
        let groups = ins / group;
        let line = 4 * outs / EACH;
        let weights = parts.whole(&name("qweight"))?;
        let zeros = parts.whole(&name("qzeros"))?;
        let stored = parts::numbers(&self.scale_type, &parts.whole(&name("scales"))?);
        let mut levels = vec![0; count * ins];
        let mut scales = vec![0.0; count * groups];
        for (g, zeros) in zeros.chunks_exact(line).enumerate() {
            for row in 0..count {
                scales[row * groups + g] = stored[g * outs + first + row];
            }
            let lines = weights.chunks_exact(line).enumerate().skip(g * group).take(group);
            for (column, line) in lines {
                for row in 0..count {
                    let value = level(line, first + row) - level(zeros, first + row);
                    levels[row * ins + column] = value;
                }
            }
        }
        Ok(Levels { levels, scales, biases: Vec::new() })
    }
}
