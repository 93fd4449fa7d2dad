//! `compressed-tensors` (vLLM, LLM Compressor): packed integers, FP8, and NVFP4.
//!
//! `pack-quantized`: `weight_packed [out, in * bits / 32]` holds levels low first, offset by half
//! their range; `weight_scale [out, groups]`; `weight_zero_point [out * bits / 32, groups]`, if
//! asymmetric, packs along the rows with the same offset; `weight_shape`. `nvfp4-pack-quantized`:
//! pairs of e2m1, the even column low, an e4m3 scale for 16 columns, and a scale for the whole
//! tensor that divides. Source: compressed-tensors 0.20 `pack_quantized.py`, `nvfp4_quantized.py`.

use serde_json::{Value, json};

use super::affine::{Affine, Levels, Shape, Unpack};
use super::float::{Floats, Numbers, e2m1, e4m3};
use super::parts::{self, PLAIN, Parts};
use super::{Described, Found, fp8, gptq, wrong};
use crate::load::Result;
use crate::load::checkpoint::Checkpoint;
use crate::load::hf::HuggingFace;
use doppler_store::DType;

pub fn find(config: &Described<'_>, files: &HuggingFace) -> Result<(String, Found)> {
    config.only("quantization_status", &[json!("compressed"), json!("frozen")])?;
    config.only("kv_cache_scheme", &[])?;
    config.only("transform_config", &[json!({})])?;
    config.only("sparsity_config", &[json!({}), json!({ "format": "dense" })])?;
    let groups = config.get("config_groups").and_then(Value::as_object);
    let groups = groups.ok_or_else(|| config.fail("config_groups is missing".into()))?;
    let of = |group: &Value, key: &str| group.get("weights").and_then(|w| w.get(key)).cloned();
    let mut found = Found::default();
    let format = config.get("format").and_then(Value::as_str).unwrap_or_default();
    let all =
        |key: &str, value: &Value| groups.values().all(|g| of(g, key).as_ref() == Some(value));
    let method = match format {
        "pack-quantized" => {
            let bits = groups.values().next().and_then(|group| of(group, "num_bits"));
            let bits = bits.filter(|bits| all("num_bits", bits)).and_then(|bits| bits.as_u64());
            let Some(bits @ (2 | 4 | 8)) = bits else {
                return Err(config.fail("num_bits is not 2, 4 or 8 in all groups".into()));
            };
            let modules = parts::modules(files, ".weight_packed");
            for module in parts::some(modules, format, |problem| config.fail(problem))? {
                integers(files, &module, bits as u32, &mut found)?;
            }
            format!("W{bits}A16")
        }
        "float-quantized" if all("num_bits", &json!(8)) && all("type", &json!("float")) => {
            fp8::tensors(config, files, &mut found)?;
            "FP8".to_owned()
        }
        "nvfp4-pack-quantized" => {
            let modules = parts::modules(files, ".weight_packed");
            for module in parts::some(modules, format, |problem| config.fail(problem))? {
                nvfp4(files, &module, &mut found)?;
            }
            "NVFP4".to_owned()
        }
        other => {
            return Err(config.fail(format!(
                "format {other:?} cannot be read (pack-quantized, float-quantized of 8 bits and \
                 nvfp4-pack-quantized can); convert the original checkpoint"
            )));
        }
    };
    Ok((method, found))
}

struct Integers {
    module: String,
    bits: u32,
    /// Words and weights of a row.
    packed: u64,
    cols: usize,
    groups: u64,
    has_zeros: bool,
    scale_type: String,
}

fn integers(files: &HuggingFace, module: &str, bits: u32, found: &mut Found) -> Result<()> {
    let name = |part: &str| format!("{module}.{part}");
    let each = u64::from(32 / bits);
    parts::expect_part(files, &name("weight_shape"), &["I64"], &[2])?;
    let shape = parts::all_bytes(files, &name("weight_shape"))?;
    let [rows, cols] =
        [0, 1].map(|i| i64::from_le_bytes(*shape.as_chunks::<8>().0.get(i).unwrap_or(&[0; 8])));
    let in_range = |n: i64| u64::try_from(n).ok().filter(|n| (1..=1 << 32).contains(n));
    let (Some(rows), Some(cols)) = (in_range(rows), in_range(cols)) else {
        return Err(wrong(&name("weight_shape"), format!("it is [{rows}, {cols}]")));
    };
    let packed = cols.div_ceil(each);
    parts::expect_part(files, &name("weight_packed"), &["I32"], &[rows, packed])?;
    let scales = parts::needed(files, &name("weight_scale"))?;
    let (_, groups) = parts::matrix_shape(&name("weight_scale"), scales)?;
    let scale_type = parts::expect(&name("weight_scale"), scales, PLAIN, &[rows, groups])?;
    if groups > cols || !cols.is_multiple_of(groups) {
        let problem = format!("it has {groups} groups for {cols} columns");
        return Err(wrong(&name("weight_scale"), problem));
    }
    let group = cols / groups;
    let zeros = files.find(&name("weight_zero_point"));
    if let Some(zeros) = zeros {
        let shape = [rows.div_ceil(each), groups];
        parts::expect(&name("weight_zero_point"), zeros, &["I32"], &shape)?;
    }
    let mut from =
        ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"].map(name).to_vec();
    let mut order = None;
    if files.find(&name("weight_g_idx")).is_some() {
        parts::expect_part(files, &name("weight_g_idx"), &["I32"], &[cols])?;
        order = gptq::order(files, &name("weight_g_idx"), group, groups)?;
        from.push(name("weight_g_idx"));
    }
    // Without zero points, levels of 8 bits are signed bytes; with them they may be larger.
    let fits = (bits < 8 || zeros.is_none()) && parts::fits_f16(files, &name("weight_scale"))?;
    let what = format!("compressed-tensors, {bits} bits in groups of {group}");
    let shape = Shape { cols, group, order };
    let integers = Integers {
        module: module.to_owned(),
        bits,
        packed,
        cols: cols as usize,
        groups,
        has_zeros: zeros.is_some(),
        scale_type,
    };
    let exact = fits.then_some(DType::Q8_0);
    let (stored, matrix) = Affine::new(what, vec![rows, cols], shape, exact, integers);
    found.add(name("weight"), stored, from, matrix);
    Ok(())
}

impl Unpack for Integers {
    fn rows(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Levels> {
        let name = |part: &str| format!("{}.{part}", self.module);
        let (bits, each) = (self.bits, 32 / self.bits as usize);
        let (mask, half) = ((1_u32 << bits) - 1, 1_i16 << (bits - 1));
        let groups = self.groups as usize;
        let row = self.groups * parts::number_bytes(&self.scale_type);
        let scales = parts.rows(&name("weight_scale"), row, first, count)?;
        let scales = parts::numbers(&self.scale_type, &scales);
        let mut zeros = vec![half; count as usize * groups];
        if self.has_zeros {
            let stored = parts::words(&parts.whole(&name("weight_zero_point"))?);
            for (row, zeros) in (first as usize..).zip(zeros.chunks_exact_mut(groups)) {
                let words = &stored[row / each * groups..][..groups];
                for (zero, word) in zeros.iter_mut().zip(words) {
                    *zero = (word >> (bits * (row % each) as u32) & mask) as i16;
                }
            }
        }
        let order = match parts.has(&name("weight_g_idx")) {
            true => Some(parts::words(&parts.whole(&name("weight_g_idx"))?)),
            false => None,
        };
        let group = self.cols / groups;
        let words = parts.rows(&name("weight_packed"), 4 * self.packed, first, count)?;
        let lines = words.chunks_exact(4 * self.packed as usize).zip(zeros.chunks_exact(groups));
        let mut levels = Vec::with_capacity(count as usize * self.cols);
        for (line, zeros) in lines {
            let words = line.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
            let stored = words.flat_map(|word| (0..each as u32).map(move |i| word >> (bits * i)));
            levels.extend(stored.take(self.cols).enumerate().map(|(column, level)| {
                let group = order.as_ref().map_or(column / group, |order| order[column] as usize);
                (level & mask) as i16 - zeros[group]
            }));
        }
        Ok(Levels { levels, scales, biases: Vec::new() })
    }
}

/// Columns that share a scale of NVFP4.
const NVFP4_GROUP: u64 = 16;

struct Nvfp4 {
    module: String,
    cols: u64,
    /// What scales are divided by.
    global: f32,
}

fn nvfp4(files: &HuggingFace, module: &str, found: &mut Found) -> Result<()> {
    let name = |part: &str| format!("{module}.{part}");
    let packed = parts::needed(files, &name("weight_packed"))?;
    let (rows, pairs) = parts::matrix_shape(&name("weight_packed"), packed)?;
    parts::expect(&name("weight_packed"), packed, &["U8"], &[rows, pairs])?;
    let cols = 2 * pairs;
    let wanted = [rows, cols.div_ceil(NVFP4_GROUP)];
    parts::expect_part(files, &name("weight_scale"), &["F8_E4M3"], &wanted)?;
    parts::expect_part(files, &name("weight_global_scale"), &["F32"], &[1])?;
    let global = parts::all_numbers(files, &name("weight_global_scale"))?[0];
    if !(global.is_finite() && global > 0.0) {
        return Err(wrong(&name("weight_global_scale"), format!("it is {global}")));
    }
    let from = ["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"];
    let nvfp4 = Nvfp4 { module: module.to_owned(), cols, global };
    let (stored, matrix) = Floats::new("NVFP4".into(), vec![rows, cols], NVFP4_GROUP, nvfp4);
    found.add(name("weight"), stored, from.map(name), matrix);
    Ok(())
}

impl Numbers for Nvfp4 {
    fn numbers(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let name = format!("{}.weight_packed", self.module);
        let pairs = parts.rows(&name, self.cols / 2, first, count)?;
        Ok(pairs.into_iter().flat_map(|pair| [e2m1(pair), e2m1(pair >> 4)]).collect())
    }

    fn scales(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let name = format!("{}.weight_scale", self.module);
        let scales = parts.rows(&name, self.cols.div_ceil(NVFP4_GROUP), first, count)?;
        Ok(scales.into_iter().map(|scale| e4m3(scale) / self.global).collect())
    }
}
