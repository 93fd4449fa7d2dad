//! GPTQ: `qweight [in * bits / 32, out]` packs levels along the input, low first; `qzeros [groups,
//! out * bits / 32]` along the output; `scales [groups, out]`; `g_idx [in]` is each input's group.
//!
//! With act-order only `g_idx` permutes; rows stay in input order. In the first format zero points
//! are stored minus one; `checkpoint_format` `gptq_v2` stores them as they are. Source: AutoGPTQ
//! 0.7 `qlinear_cuda_old.py`, GPTQModel `dequantize_model`.

use serde_json::{Value, json};

use super::affine::{Affine, Levels, Shape, Unpack};
use super::parts::{self, PLAIN, Parts};
use super::{Described, Found, wrong};
use crate::load::Result;
use crate::load::checkpoint::Checkpoint;
use crate::load::hf::HuggingFace;
use doppler_store::DType;

struct Gptq {
    module: String,
    /// 2, 4 or 8.
    bits: u32,
    ins: usize,
    outs: usize,
    /// Inputs of a group, where they are in order.
    group: usize,
    groups: usize,
    /// What is added to stored zero points.
    offset: u32,
    scale_type: String,
}

pub fn find(config: &Described<'_>, files: &HuggingFace) -> Result<(String, Found)> {
    config.only("checkpoint_format", &[json!("gptq"), json!("gptq_v2")])?;
    config.only("is_marlin_format", &[json!(false)])?;
    config.only("dynamic", &[json!({})])?;
    config.only("bits", &[json!(2), json!(4), json!(8)])?;
    let bits = config.number(&["bits"])? as u32; // one of these three
    let group = config.group_size(&["group_size"])?;
    let second = config.get("checkpoint_format") == Some(&Value::from("gptq_v2"));
    let offset = u32::from(!second);
    let modules = parts::modules(files, ".qweight");
    let mut found = Found::default();
    for module in parts::some(modules, "GPTQ", |problem| config.fail(problem))? {
        one(files, &module, (bits, group, offset), &mut found)?;
    }
    Ok((format!("GPTQ_{bits}BIT"), found))
}

fn one(
    files: &HuggingFace,
    module: &str,
    (bits, group, offset): (u32, Option<u64>, u32),
    found: &mut Found,
) -> Result<()> {
    let name = |part: &str| format!("{module}.{part}");
    let each = u64::from(32 / bits);
    let qweight = parts::needed(files, &name("qweight"))?;
    let (packed, outs) = parts::matrix_shape(&name("qweight"), qweight)?;
    parts::expect(&name("qweight"), qweight, &["I32"], &[packed, outs])?;
    let ins = packed * each;
    let group = group.unwrap_or(ins).min(ins);
    let groups = ins.div_ceil(group);
    parts::expect_part(files, &name("qzeros"), &["I32"], &[groups, outs.div_ceil(each)])?;
    let scale_type = parts::expect_part(files, &name("scales"), PLAIN, &[groups, outs])?;
    let mut from = vec![name("qweight"), name("qzeros"), name("scales")];
    let mut order = None;
    if files.find(&name("g_idx")).is_some() {
        parts::expect_part(files, &name("g_idx"), &["I32"], &[ins])?;
        order = self::order(files, &name("g_idx"), group, groups)?;
        from.push(name("g_idx"));
    }
    let fits = bits < 8 || zeros_are_middle(files, &name("qzeros"), offset)?;
    let exact = fits && parts::fits_f16(files, &name("scales"))?;
    let acts = if order.is_some() { ", in act-order" } else { "" };
    let what = format!("GPTQ, {bits} bits in groups of {group}{acts}");
    let shape = Shape { cols: ins, group, order };
    let gptq = Gptq {
        module: module.to_owned(),
        bits,
        ins: ins as usize,
        outs: outs as usize,
        group: group as usize,
        groups: groups as usize,
        offset,
        scale_type,
    };
    let exact = exact.then_some(DType::Q8_0);
    let (stored, matrix) = Affine::new(what, vec![outs, ins], shape, exact, gptq);
    found.add(name("weight"), stored, from, matrix);
    Ok(())
}

/// The group of each column, if it is not simply the next group after `group` columns.
pub fn order(files: &HuggingFace, name: &str, group: u64, groups: u64) -> Result<Option<Vec<u32>>> {
    let order = parts::words(&parts::all_bytes(files, name)?);
    if let Some((column, odd)) = order.iter().enumerate().find(|(_, of)| u64::from(**of) >= groups)
    {
        let odd = *odd as i32; // as it is stored
        return Err(wrong(name, format!("column {column} is in group {odd}, of {groups} groups")));
    }
    let plain = (0_u64..).zip(&order).all(|(column, of)| column / group == u64::from(*of));
    Ok((!plain).then_some(order))
}

/// Whether levels of 8 bits minus zero points are signed bytes: every zero point is 128.
fn zeros_are_middle(files: &HuggingFace, name: &str, offset: u32) -> Result<bool> {
    let zeros = parts::all_bytes(files, name)?;
    Ok(zeros.iter().all(|zero| u32::from(*zero) + offset == 128))
}

impl Unpack for Gptq {
    fn rows(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Levels> {
        let name = |part: &str| format!("{}.{part}", self.module);
        let (first, count) = (first as usize, count as usize);
        let (ins, outs, groups) = (self.ins, self.outs, self.groups);
        let (bits, each) = (self.bits, (32 / self.bits) as usize);
        let mask = (1_u32 << bits) - 1;
        let weights = parts.whole(&name("qweight"))?;
        let zeros = parts::words(&parts.whole(&name("qzeros"))?);
        let stored = parts::numbers(&self.scale_type, &parts.whole(&name("scales"))?);
        let order = match parts.has(&name("g_idx")) {
            true => Some(parts::words(&parts.whole(&name("g_idx"))?)),
            false => None,
        };
        let across = outs.div_ceil(each);
        let mut zero = vec![0_i16; count * groups];
        let mut scales = vec![0.0; count * groups];
        for row in 0..count {
            let out = first + row;
            for g in 0..groups {
                let word = zeros[g * across + out / each];
                let stored_zero = word >> (bits * (out % each) as u32) & mask;
                zero[row * groups + g] = ((stored_zero + self.offset) & mask) as i16;
                scales[row * groups + g] = stored[g * outs + out];
            }
        }
        let mut levels = vec![0; count * ins];
        for (number, line) in weights.chunks_exact(4 * outs).enumerate() {
            let line = &line[4 * first..4 * (first + count)];
            for (row, word) in line.as_chunks::<4>().0.iter().enumerate() {
                let word = u32::from_le_bytes(*word);
                for i in 0..each {
                    let column = number * each + i;
                    let g =
                        order.as_ref().map_or(column / self.group, |order| order[column] as usize);
                    let level = (word >> (bits * i as u32) & mask) as i16;
                    levels[row * ins + column] = level - zero[row * groups + g];
                }
            }
        }
        Ok(Levels { levels, scales, biases: Vec::new() })
    }
}
