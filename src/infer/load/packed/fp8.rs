//! FP8 e4m3: `MODULE.weight` with scales that multiply.
//!
//! DeepSeek's form has a scale for each block of rows and columns (`weight_scale_inv`, F32; blocks
//! at the edges are smaller). `compressed-tensors` has one for each row or for the whole tensor
//! (`weight_scale`). Where a scale is that of whole blocks of 128 columns, the bits are kept (the
//! table's FP8); otherwise weights are computed in F32. Scales of activations are not needed: activations stay as they are.

use serde_json::{Value, json};

use super::float::{Floats, Numbers, e4m3};
use super::parts::{self, PLAIN, Parts};
use super::{Described, Found, Matrix, wrong};
use crate::load::Result;
use crate::load::checkpoint::{Checkpoint, Form, Stored};
use crate::load::hf::HuggingFace;
use doppler_store::DType;

struct Fp8 {
    weight: String,
    cols: u64,
    scale: String,
    scale_type: String,
    /// Rows and columns that share a scale.
    block: (u64, u64),
}

pub fn find(config: &Described<'_>, files: &HuggingFace) -> Result<(String, Found)> {
    config.only("fmt", &[json!("e4m3")])?;
    config.only("activation_scheme", &[json!("dynamic"), json!("static")])?;
    let block = match config.get("weight_block_size") {
        None => None,
        Some(value) => match value.as_array().map(Vec::as_slice) {
            Some([rows, cols]) => Some((side(config, rows)?, side(config, cols)?)),
            _ => return Err(config.fail(format!("weight_block_size is {value}"))),
        },
    };
    let mut found = Found::default();
    match block {
        Some(block) => {
            let modules = parts::modules(files, ".weight_scale_inv");
            for module in parts::some(modules, "FP8", |problem| config.fail(problem))? {
                let scale = format!("{module}.weight_scale_inv");
                let what = format!("FP8 e4m3 in blocks of {} x {}", block.0, block.1);
                blocks(files, &module, scale, block, what, &mut found)?;
            }
        }
        None => tensors(config, files, &mut found)?,
    }
    Ok(("FP8".to_owned(), found))
}

fn side(config: &Described<'_>, value: &Value) -> Result<u64> {
    let side = value.as_u64().filter(|side| (1..=1 << 20).contains(side));
    side.ok_or_else(|| config.fail(format!("weight_block_size contains {value}")))
}

/// All matrices with `weight_scale`.
pub fn tensors(config: &Described<'_>, files: &HuggingFace, found: &mut Found) -> Result<()> {
    let modules = parts::modules(files, ".weight_scale");
    for module in parts::some(modules, "FP8", |problem| config.fail(problem))? {
        let name = format!("{module}.weight_scale");
        let (rows, cols) = shape(files, &format!("{module}.weight"))?;
        let stored = parts::needed(files, &name)?;
        let (block, each) = match stored.shape[..] {
            [] | [1] => ((rows, cols), "tensor"),
            [count] if count == rows => ((1, cols), "row"),
            [count, 1] if count == rows => ((1, cols), "row"),
            [1, 1] => ((rows, cols), "tensor"),
            _ => {
                let problem =
                    format!("its shape is {:?}, expected [{rows}, 1] or [1]", stored.shape);
                return Err(wrong(&name, problem));
            }
        };
        parts::expect(&name, stored, PLAIN, &stored.shape)?;
        add(files, &module, name, block, format!("FP8 e4m3, a scale a {each}"), found)?;
    }
    Ok(())
}

/// The shape of a matrix of e4m3.
fn shape(files: &HuggingFace, name: &str) -> Result<(u64, u64)> {
    let stored = parts::needed(files, name)?;
    let (rows, cols) = parts::matrix_shape(name, stored)?;
    parts::expect(name, stored, &["F8_E4M3"], &[rows, cols])?;
    Ok((rows, cols))
}

/// A matrix with a scale for each block.
fn blocks(
    files: &HuggingFace,
    module: &str,
    scale: String,
    block: (u64, u64),
    what: String,
    found: &mut Found,
) -> Result<()> {
    let (rows, cols) = shape(files, &format!("{module}.weight"))?;
    let wanted = [rows.div_ceil(block.0), cols.div_ceil(block.1)];
    parts::expect_part(files, &scale, PLAIN, &wanted)?;
    add(files, module, scale, block, what, found)
}

fn add(
    files: &HuggingFace,
    module: &str,
    scale: String,
    block: (u64, u64),
    what: String,
    found: &mut Found,
) -> Result<()> {
    let weight = format!("{module}.weight");
    let (rows, cols) = shape(files, &weight)?;
    let scale_type = parts::type_of(parts::needed(files, &scale)?);
    let activations = [format!("{module}.input_scale"), format!("{module}.activation_scale")];
    let unused = activations.into_iter().filter(|name| files.find(name).is_some());
    let from: Vec<String> = [weight.clone(), scale.clone()].into_iter().chain(unused).collect();
    let fp8 = Fp8 { weight: weight.clone(), cols, scale, scale_type, block };
    let whole = DType::Fp8.block_len() as u64;
    if block.1.is_multiple_of(whole) || block.1 >= cols {
        let stored = Stored { shape: vec![rows, cols], form: Form::Blocks(DType::Fp8) };
        found.add(weight, stored, from, Kept(fp8));
        return Ok(());
    }
    let (stored, matrix) = Floats::new(what, vec![rows, cols], block.1, fp8);
    found.add(weight, stored, from, matrix);
    Ok(())
}

/// A matrix whose scales fit the table's blocks: its bits are kept.
struct Kept(Fp8);

impl Matrix for Kept {
    fn read(&self, parts: &Parts<'_>, first: u64, out: &mut [u8]) -> Result<()> {
        let (cols, wide) = (self.0.cols as usize, self.0.block.1.min(self.0.cols) as usize);
        let (len, row) = (DType::Fp8.block_len(), DType::Fp8.row_bytes(cols));
        let count = (out.len() / row) as u64;
        let bytes = parts.rows(&self.0.weight, self.0.cols, first, count)?;
        let scales = self.0.scales(parts, first, count)?;
        let rows = out.chunks_exact_mut(row).zip(bytes.chunks_exact(cols));
        for ((out, bytes), scales) in rows.zip(scales.chunks_exact(cols.div_ceil(wide))) {
            let blocks = out.chunks_exact_mut(DType::Fp8.block_bytes()).zip(bytes.chunks(len));
            for (number, (block, bytes)) in blocks.enumerate() {
                let (scale, numbers) = block.split_at_mut(4);
                scale.copy_from_slice(&scales[number * len / wide].to_le_bytes());
                let (numbers, rest) = numbers.split_at_mut(bytes.len());
                numbers.copy_from_slice(bytes);
                rest.fill(0);
            }
        }
        Ok(())
    }
}

impl Numbers for Fp8 {
    fn numbers(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let bytes = parts.rows(&self.weight, self.cols, first, count)?;
        Ok(bytes.into_iter().map(e4m3).collect())
    }

    fn scales(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let (tall, wide) = self.block;
        let across = self.cols.div_ceil(wide);
        let start = first / tall;
        let lines = (first + count - 1) / tall - start + 1;
        let row = across * parts::number_bytes(&self.scale_type);
        let scales = parts.rows(&self.scale, row, start, lines)?;
        let scales = parts::numbers(&self.scale_type, &scales);
        let line = |row: u64| {
            let at = ((row / tall - start) * across) as usize;
            &scales[at..at + across as usize]
        };
        Ok((first..first + count).flat_map(line).copied().collect())
    }
}
