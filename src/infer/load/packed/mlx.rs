//! MLX: `weight` is a little-endian string of bits in U32 words, with `scales` for each group of
//! columns.
//!
//! Affine (also if no mode is named): `scales` and `biases`, `scale * level + bias`, 2 to 8 bits.
//! `mxfp4`, `mxfp8`, `nvfp4`: numbers of e2m1 or e4m3 with scales in U8 (E8M0, or e4m3 for nvfp4).
//! The config may give modules other bits and groups, or `false`; tensors must agree with it.
//! Embeddings, routers and stacks of experts are packed in the same way. Source: mlx-lm 0.32
//! `utils.py`, MLX `quantize`.

use serde_json::{Value, json};

use super::affine::{Affine, Levels, Shape, Unpack};
use super::float::{Floats, Numbers, e2m1, e4m3, e8m0};
use super::mxfp4::Pairs;
use super::parts::{self, PLAIN, Parts};
use super::{Described, Found, wrong};
use crate::load::Result;
use crate::load::hf::HuggingFace;
use doppler_store::DType;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

/// How one module is packed.
#[derive(Debug, Clone, Copy)]
struct Scheme {
    mode: Mode,
    bits: u64,
    group: u64,
}

pub fn find(config: &Described<'_>, files: &HuggingFace) -> Result<(String, Found)> {
    let whole = scheme(config, config.value, None)?;
    let mut found = Found::default();
    let modules = parts::modules(files, ".scales");
    for module in parts::some(modules, "MLX", |problem| config.fail(problem))? {
        let own = match config.get(&module) {
            None => whole,
            Some(own @ Value::Object(_)) => scheme(config, own, Some(whole))?,
            Some(Value::Bool(false)) => {
                let problem = "the config says that it is not quantised, but it has scales";
                return Err(wrong(&module, problem));
            }
            Some(other) => return Err(config.fail(format!("{module} is {other}"))),
        };
        one(files, &module, own, &mut found)?;
    }
    let method = match whole.mode {
        Mode::Affine => format!("MLX_{}BIT", whole.bits),
        Mode::Mxfp4 => "MXFP4".to_owned(),
        Mode::Mxfp8 => "MXFP8".to_owned(),
        Mode::Nvfp4 => "NVFP4".to_owned(),
    };
    Ok((method, found))
}

/// Reads mode, bits and group size. What a module does not say is as in the whole.
fn scheme(config: &Described<'_>, value: &Value, whole: Option<Scheme>) -> Result<Scheme> {
    let described = Described { value, fail: config.fail };
    let modes = ["affine", "mxfp4", "mxfp8", "nvfp4"];
    described.only("mode", &modes.map(|mode| json!(mode)))?;
    let mode = match (described.get("mode").and_then(Value::as_str), whole) {
        (Some("mxfp4"), _) => Mode::Mxfp4,
        (Some("mxfp8"), _) => Mode::Mxfp8,
        (Some("nvfp4"), _) => Mode::Nvfp4,
        (None, Some(whole)) if described.get("bits").is_none() => whole.mode,
        _ => Mode::Affine,
    };
    let number = |key: &str, whole: Option<u64>| match (described.get(key), whole) {
        (None, Some(whole)) => Ok(whole),
        _ => described.number(&[key]).map(|number| number.max(0) as u64),
    };
    let bits = number("bits", whole.map(|whole| whole.bits))?;
    let group = number("group_size", whole.map(|whole| whole.group))?;
    let possible = match mode {
        Mode::Affine => matches!(bits, 2..=6 | 8) && [16, 32, 64, 128].contains(&group),
        Mode::Mxfp4 => (bits, group) == (4, 32),
        Mode::Mxfp8 => (bits, group) == (8, 32),
        Mode::Nvfp4 => (bits, group) == (4, 16),
    };
    if !possible {
        let problem = format!("{bits} bits in groups of {group} are not possible ({mode:?})");
        return Err(config.fail(problem));
    }
    Ok(Scheme { mode, bits, group })
}

fn one(files: &HuggingFace, module: &str, scheme: Scheme, found: &mut Found) -> Result<()> {
    let name = |part: &str| format!("{module}.{part}");
    let Scheme { mode, bits, group } = scheme;
    let weight = parts::needed(files, &name("weight"))?;
    let Some((&words, outer)) = weight.shape.split_last().filter(|_| weight.shape.len() > 1) else {
        return Err(wrong(&name("weight"), format!("its shape is {:?}", weight.shape)));
    };
    parts::expect(&name("weight"), weight, &["U32"], &weight.shape)?;
    let string = words.checked_mul(32).filter(|string| *string > 0 && string.is_multiple_of(bits));
    let cols = string.map(|string| string / bits).filter(|cols| cols.is_multiple_of(group));
    let Some(cols) = cols else {
        let problem =
            format!("rows of {words} words are no whole groups of {group} weights of {bits} bits");
        return Err(wrong(&name("weight"), problem));
    };
    let shape = |last: u64| [outer, &[last]].concat();
    let types = if mode == Mode::Affine { PLAIN } else { &["U8"] };
    let scale_type = parts::expect_part(files, &name("scales"), types, &shape(cols / group))?;
    let module = module.to_owned();
    if mode == Mode::Mxfp4 {
        let groups = cols / group;
        let pairs = Pairs { pairs: name("weight"), scales: name("scales"), groups };
        let stored = Pairs::stored(shape(cols));
        found.add(name("weight"), stored, ["weight", "scales"].map(name), pairs);
        return Ok(());
    }
    if mode != Mode::Affine {
        let what = format!("MLX {}", format!("{mode:?}").to_uppercase());
        let packed = Packed { module: module.clone(), mode, words, groups: cols / group };
        let (stored, matrix) = Floats::new(what, shape(cols), group, packed);
        found.add(format!("{module}.weight"), stored, ["weight", "scales"].map(name), matrix);
        return Ok(());
    }
    parts::expect_part(files, &name("biases"), &[&scale_type], &shape(cols / group))?;
    let fits = bits <= 4
        && parts::fits_f16(files, &name("scales"))?
        && parts::fits_f16(files, &name("biases"))?;
    let what = format!("MLX, {bits} bits in groups of {group}");
    let from = ["weight", "scales", "biases"].map(name);
    let words = Words { module: module.clone(), bits, words, groups: cols / group, scale_type };
    let order = Shape { cols, group, order: None };
    let exact = fits.then_some(DType::Q4_1);
    let (stored, matrix) = Affine::new(what, shape(cols), order, exact, words);
    found.add(format!("{module}.weight"), stored, from, matrix);
    Ok(())
}

struct Words {
    module: String,
    bits: u64,
    /// Words of a row.
    words: u64,
    groups: u64,
    scale_type: String,
}

impl Unpack for Words {
    fn rows(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Levels> {
        let name = |part: &str| format!("{}.{part}", self.module);
        let row = self.groups * parts::number_bytes(&self.scale_type);
        let numbers = |part: &str| -> Result<Vec<f32>> {
            let bytes = parts.rows(&name(part), row, first, count)?;
            Ok(parts::numbers(&self.scale_type, &bytes))
        };
        let (scales, biases) = (numbers("scales")?, numbers("biases")?);
        let bytes = parts.rows(&name("weight"), 4 * self.words, first, count)?;
        let cols = (self.words * 32 / self.bits) as usize;
        let (bits, mask) = (self.bits as usize, (1_u16 << self.bits) - 1);
        let mut levels = Vec::with_capacity(count as usize * cols);
        for line in bytes.chunks_exact(4 * self.words as usize) {
            levels.extend((0..cols).map(|column| {
                let at = bits * column;
                let high = line.get(at / 8 + 1).copied().unwrap_or(0);
                (u16::from_le_bytes([line[at / 8], high]) >> (at % 8) & mask) as i16
            }));
        }
        Ok(Levels { levels, scales, biases })
    }
}

/// Floating point numbers.
struct Packed {
    module: String,
    mode: Mode,
    words: u64,
    groups: u64,
}

impl Numbers for Packed {
    fn numbers(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let name = format!("{}.weight", self.module);
        let bytes = parts.rows(&name, 4 * self.words, first, count)?;
        Ok(match self.mode {
            Mode::Mxfp8 => bytes.into_iter().map(e4m3).collect(),
            _ => bytes.into_iter().flat_map(|pair| [e2m1(pair), e2m1(pair >> 4)]).collect(),
        })
    }

    fn scales(&self, parts: &Parts<'_>, first: u64, count: u64) -> Result<Vec<f32>> {
        let scales = parts.rows(&format!("{}.scales", self.module), self.groups, first, count)?;
        let scale = if self.mode == Mode::Nvfp4 { e4m3 } else { e8m0 };
        Ok(scales.into_iter().map(scale).collect())
    }
}
