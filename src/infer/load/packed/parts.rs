//! Access to the tensors that packed matrices are made of: by rows, or as a whole.

use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

use super::super::checkpoint::{Checkpoint, Form, Stored};
use super::super::hf::HuggingFace;
use super::super::{LoadError, Result, missing};
use super::wrong;
use doppler_store::DType;

/// The whole tensors that are kept: those of one matrix.
const CACHED_MAX: usize = 4;

/// Tensors that were read as a whole, the newest last.
#[derive(Default)]
pub struct Cache(Mutex<Vec<(String, Arc<Vec<u8>>)>>);

/// Reads tensors of a directory.
pub struct Parts<'a> {
    files: &'a HuggingFace,
    cache: &'a Cache,
}

impl<'a> Parts<'a> {
    pub const fn new(files: &'a HuggingFace, cache: &'a Cache) -> Self {
        Self { files, cache }
    }

    /// Some rows of `row` bytes each.
    pub fn rows(&self, name: &str, row: u64, first: u64, count: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (row * count) as usize];
        self.files.read_bytes(name, row * first, &mut bytes)?;
        Ok(bytes)
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.files.bytes(name).is_some()
    }

    /// All bytes of a tensor. Kept until other matrices are read, because a matrix whose rows are
    /// columns of the stored tensor needs all of it for each part.
    pub fn whole(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        let mut cached = self.cache.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = cached.iter().find(|(own, _)| own == name) {
            return Ok(bytes.clone());
        }
        let size = self.files.bytes(name).ok_or_else(|| missing(self.files, name))?;
        let bytes = Arc::new(self.rows(name, size, 0, 1)?);
        if cached.len() == CACHED_MAX {
            cached.remove(0);
        }
        cached.push((name.to_owned(), bytes.clone()));
        Ok(bytes)
    }
}

/// A stored tensor of this name, which a matrix needs.
pub fn needed<'a>(files: &'a HuggingFace, name: &str) -> Result<&'a Stored> {
    files.find(name).ok_or_else(|| wrong(name, "it is missing, and the weights beside it need it"))
}

/// A tensor's type as the file spells it.
pub fn type_of(stored: &Stored) -> String {
    match &stored.form {
        Form::Unreadable(what) => what.clone(),
        Form::Blocks(DType::F32) => "F32".to_owned(),
        Form::Blocks(DType::F16) => "F16".to_owned(),
        _ => "BF16".to_owned(),
    }
}

/// Checks a tensor's type and shape, and returns its type.
pub fn expect(name: &str, stored: &Stored, types: &[&str], shape: &[u64]) -> Result<String> {
    let found = type_of(stored);
    if !types.contains(&found.as_str()) {
        return Err(wrong(name, format!("its type is {found}, expected {}", types.join(" or "))));
    }
    if stored.shape != shape {
        return Err(wrong(name, format!("its shape is {:?}, expected {shape:?}", stored.shape)));
    }
    Ok(found)
}

/// As [`expect`], of a tensor that must be there.
pub fn expect_part(
    files: &HuggingFace,
    name: &str,
    types: &[&str],
    shape: &[u64],
) -> Result<String> {
    expect(name, needed(files, name)?, types, shape)
}

/// The types of plain numbers.
pub const PLAIN: &[&str] = &["F32", "F16", "BF16"];

/// Plain numbers of the type `what`.
pub fn numbers(what: &str, bytes: &[u8]) -> Vec<f32> {
    match what {
        "F32" => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        "F16" => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        _ => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

/// Bytes of a plain number.
pub fn number_bytes(what: &str) -> u64 {
    if what == "F32" { 4 } else { 2 }
}

/// All numbers of a small tensor of a plain type, when a checkpoint is opened.
pub fn all_numbers(files: &HuggingFace, name: &str) -> Result<Vec<f32>> {
    let stored = needed(files, name)?;
    Ok(numbers(&type_of(stored), &all_bytes(files, name)?))
}

/// All bytes of a small tensor, when a checkpoint is opened.
pub fn all_bytes(files: &HuggingFace, name: &str) -> Result<Vec<u8>> {
    let size = files.bytes(name).ok_or_else(|| missing(files, name))?;
    let mut bytes = vec![0; size as usize];
    files.read_bytes(name, 0, &mut bytes)?;
    Ok(bytes)
}

/// Whether every number of a tensor is exactly an F16.
pub fn fits_f16(files: &HuggingFace, name: &str) -> Result<bool> {
    if type_of(needed(files, name)?) == "F16" {
        return Ok(true);
    }
    let same = |value: &f32| f16::from_f32(*value).to_f32() == *value;
    Ok(all_numbers(files, name)?.iter().all(same))
}

/// 32-bit words.
pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// The names of all tensors that end like this, without the end.
pub fn modules(files: &HuggingFace, end: &str) -> Vec<String> {
    files.names().filter_map(|name| name.strip_suffix(end)).map(str::to_owned).collect()
}

/// Two dimensions of a tensor.
pub fn matrix_shape(name: &str, stored: &Stored) -> Result<(u64, u64)> {
    match stored.shape[..] {
        [rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
        _ => Err(wrong(name, format!("its shape is {:?}, expected two dimensions", stored.shape))),
    }
}

/// Refuses a module without weights to read.
pub fn some<T>(
    found: Vec<T>,
    method: &str,
    fail: impl FnOnce(String) -> LoadError,
) -> Result<Vec<T>> {
    match found.is_empty() {
        true => Err(fail(format!("no tensor here is packed as {method} packs"))),
        false => Ok(found),
    }
}
