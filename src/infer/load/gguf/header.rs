//! The header of a GGUF file: metadata and the list of tensors, checked before anything is
//! allocated for them.
//!
//! A reader of our own. `gguf-rs-lib` reads version 3 only and knows neither MXFP4 nor IQ types;
//! `ggus` takes the whole file as one slice, which means mapping it, and 41 crates. What is needed
//! here is small. Little-endian files of version 2 and 3 are read; version 1 and big-endian files
//! are refused by name. Invariants: nothing is reserved on the file's word, so memory grows only
//! with bytes that were read; every tensor's bytes lie within the file; a string in an error
//! message is quoted, so that a message is one line.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::types::GgmlType;

/// The longest header that is read, in bytes: ten times that of a vocabulary of 262,144 tokens.
const HEADER_BYTES_MAX: u64 = 128 << 20;
/// The most metadata keys.
const KEYS_MAX: u64 = 1 << 14;
/// The most tensors in one file.
const TENSORS_MAX: u64 = 1 << 16;
/// The most elements of a metadata array: tokens, or the merges of a vocabulary.
const ELEMENTS_MAX: u64 = 1 << 22;
/// The longest key or tensor name, in bytes.
const NAME_BYTES_MAX: u64 = 1024;
/// The longest metadata string, in bytes: a chat template.
const STRING_BYTES_MAX: u64 = 4 << 20;
/// The most dimensions of a tensor (`GGML_MAX_DIMS`).
const DIMENSIONS_MAX: u32 = 4;
/// The largest alignment of tensors, in bytes.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// The alignment if the file does not state one.
const ALIGNMENT_DEFAULT: u64 = 32;

/// A metadata value. Integers of all widths are one variant.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> String {
        match self {
            Self::Integer(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::String(text) => match text.char_indices().nth(60) {
                None => format!("{text:?}"),
                Some((end, _)) => format!("{:?}...", &text[..end]),
            },
            Self::Integers(list) => format!("a list of {} integers", list.len()),
            Self::Floats(list) => format!("a list of {} floats", list.len()),
            Self::Bools(list) => format!("a list of {} booleans", list.len()),
            Self::Strings(list) => format!("a list of {} strings", list.len()),
        }
    }
}

/// A tensor, and where its bytes begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Outermost dimension first, as elsewhere here; in the file the innermost is first.
    pub shape: Vec<u64>,
    pub ggml: GgmlType,
    /// Bytes from the start of the file.
    pub start: u64,
}

/// A header whose claims fit the file's size.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

type Result<T> = std::result::Result<T, String>;

/// Reads a header from the start of a file of `size` bytes.
///
/// # Errors
/// One line that says what is wrong.
pub fn read(from: impl Read, size: u64) -> Result<Header> {
    let mut bytes = Bytes { from, at: 0, size };
    if bytes.array::<4>("the magic number")? != *b"GGUF" {
        return Err("not a GGUF file: it does not begin with the letters GGUF".into());
    }
    let version = bytes.u32("the version")?;
    match version {
        2 | 3 => {}
        // A small number whose bytes are the other way round.
        _ if version.swap_bytes() < 1 << 16 => {
            return Err(format!(
                "big-endian (version {}): only little-endian files can be read; convert it with \
                 gguf_convert_endian.py of llama.cpp",
                version.swap_bytes()
            ));
        }
        _ => return Err(format!("GGUF version {version} cannot be read (2 and 3 can)")),
    }
    let tensors = bytes.count("tensors", TENSORS_MAX)?;
    let keys = bytes.count("metadata keys", KEYS_MAX)?;
    let mut metadata = BTreeMap::new();
    for number in 0..keys {
        let key = bytes.string(NAME_BYTES_MAX, &format!("metadata key {number}"))?;
        let value = bytes.value(&format!("metadata {key:?}"))?;
        if metadata.contains_key(&key) {
            return Err(format!("metadata {key:?} occurs twice"));
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&metadata)?;
    let mut listed = Vec::new();
    let mut names = BTreeSet::new();
    for number in 0..tensors {
        let (name, tensor) = bytes.tensor(number)?;
        if !names.insert(name.clone()) {
            return Err(format!("tensor {name:?} occurs twice"));
        }
        listed.push((name, tensor));
    }
    let data = bytes.at.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, tensor) in listed {
        let tensor = place(tensor, data, alignment, size)
            .map_err(|problem| format!("tensor {name:?}: {problem}"))?;
        tensors.insert(name, tensor);
    }
    Ok(Header { metadata, tensors })
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::Integer(value)) => u64::try_from(*value)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= ALIGNMENT_MAX)
            .ok_or_else(|| {
                format!("general.alignment is {value}, expected a power of 2 up to {ALIGNMENT_MAX}")
            }),
        Some(other) => Err(format!("general.alignment is {}, expected a number", other.kind())),
    }
}

/// A tensor as listed: its type and offset are not checked yet.
struct Listed {
    shape: Vec<u64>,
    ggml: u32,
    /// Bytes from the start of the data.
    offset: u64,
}

/// Checks a tensor's type and place.
fn place(listed: Listed, data: u64, alignment: u64, size: u64) -> Result<TensorInfo> {
    let Listed { shape, ggml, offset } = listed;
    let ggml = GgmlType::of(ggml)?;
    let cols = *shape.last().expect("a tensor has a dimension");
    let (len, block) = ggml.block();
    if !cols.is_multiple_of(len) {
        return Err(format!("rows of {cols} are not whole blocks of {ggml}, which have {len}"));
    }
    let rows = shape.iter().rev().skip(1).try_fold(1_u64, |n, dim| n.checked_mul(*dim));
    let bytes =
        rows.and_then(|rows| rows.checked_mul(cols / len)).and_then(|n| n.checked_mul(block));
    let Some(bytes) = bytes else {
        return Err(format!("its shape {shape:?} is larger than any file"));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(format!("its offset {offset} is not a multiple of {alignment}"));
    }
    let start = data.checked_add(offset);
    match start.and_then(|start| start.checked_add(bytes)) {
        Some(end) if end <= size => {}
        end => {
            let end = end.map_or("beyond any file".to_owned(), |end| format!("at byte {end}"));
            return Err(format!(
                "it ends {end}, and the file has {size} bytes: it is truncated or damaged"
            ));
        }
    }
    Ok(TensorInfo { shape, ggml, start: data + offset })
}

/// The file's bytes in order, and how many of them were read.
struct Bytes<R> {
    from: R,
    at: u64,
    size: u64,
}

impl<R: Read> Bytes<R> {
    /// How many bytes of the header may follow.
    const fn left(&self) -> u64 {
        let end = if self.size < HEADER_BYTES_MAX { self.size } else { HEADER_BYTES_MAX };
        end.saturating_sub(self.at)
    }

    /// Refuses to read `count` bytes that the file does not have.
    fn need(&self, count: u64, what: &str) -> Result<()> {
        if count <= self.left() {
            return Ok(());
        }
        Err(match self.size > HEADER_BYTES_MAX {
            true => format!("its header is longer than {HEADER_BYTES_MAX} bytes, within {what}"),
            false => format!("truncated: the file ends within {what}"),
        })
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.need(N as u64, what)?;
        let mut out = [0; N];
        self.from.read_exact(&mut out).map_err(|error| format!("{what}: {error}"))?;
        self.at += N as u64;
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64> {
        let count = self.u64(&format!("the number of {what}"))?;
        match count <= max {
            true => Ok(count),
            false => Err(format!("it claims {count} {what} (at most {max})")),
        }
    }

    fn string(&mut self, max: u64, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        if length > max {
            return Err(format!("{what} claims {length} bytes (at most {max})"));
        }
        self.need(length, what)?;
        let mut text = Vec::new();
        let read = (&mut self.from).take(length).read_to_end(&mut text);
        let read = read.map_err(|error| format!("{what}: {error}"))?;
        if read as u64 != length {
            return Err(format!("truncated: the file ends within {what}"));
        }
        self.at += length;
        String::from_utf8(text).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, what: &str) -> Result<Value> {
        let kind = self.u32(what)?;
        match kind {
            9 => self.list(what),
            _ => self.single(kind, what),
        }
    }

    /// A value that is not a list. The numbers are the format's.
    fn single(&mut self, kind: u32, what: &str) -> Result<Value> {
        let integer = |value: i128| Ok(Value::Integer(value));
        match kind {
            0 => integer(u8::from_le_bytes(self.array(what)?).into()),
            1 => integer(i8::from_le_bytes(self.array(what)?).into()),
            2 => integer(u16::from_le_bytes(self.array(what)?).into()),
            3 => integer(i16::from_le_bytes(self.array(what)?).into()),
            4 => integer(u32::from_le_bytes(self.array(what)?).into()),
            5 => integer(i32::from_le_bytes(self.array(what)?).into()),
            6 => Ok(Value::Float(widen(f32::from_le_bytes(self.array(what)?)))),
            7 => match self.array::<1>(what)? {
                [0] => Ok(Value::Bool(false)),
                [1] => Ok(Value::Bool(true)),
                [odd] => Err(format!("{what} is a boolean of value {odd}")),
            },
            8 => Ok(Value::String(self.string(STRING_BYTES_MAX, what)?)),
            10 => integer(u64::from_le_bytes(self.array(what)?).into()),
            11 => integer(i64::from_le_bytes(self.array(what)?).into()),
            12 => Ok(Value::Float(f64::from_le_bytes(self.array(what)?))),
            other => Err(format!("{what} has the unknown value type {other}")),
        }
    }

    fn list(&mut self, what: &str) -> Result<Value> {
        let kind = self.u32(what)?;
        let count = self.u64(what)?;
        if count > ELEMENTS_MAX {
            return Err(format!("{what} claims {count} elements (at most {ELEMENTS_MAX})"));
        }
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(format!("{what} is a list of lists, which is not understood")),
            other => return Err(format!("{what} has the unknown value type {other}")),
        };
        self.need(count * least, what)?;
        let mut each = || self.single(kind, what);
        Ok(match kind {
            6 | 12 => Value::Floats((0..count).map(|_| each().map(float)).collect::<Result<_>>()?),
            7 => Value::Bools((0..count).map(|_| each().map(boolean)).collect::<Result<_>>()?),
            8 => Value::Strings((0..count).map(|_| each().map(string)).collect::<Result<_>>()?),
            _ => Value::Integers((0..count).map(|_| each().map(small)).collect::<Result<_>>()?),
        })
    }

    fn tensor(&mut self, number: u64) -> Result<(String, Listed)> {
        let name = self.string(NAME_BYTES_MAX, &format!("the name of tensor {number}"))?;
        let what = format!("tensor {name:?}");
        let dimensions = self.u32(&what)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(format!("{what} has {dimensions} dimensions (1 to {DIMENSIONS_MAX})"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&what)?);
        }
        shape.reverse();
        if shape.contains(&0) {
            return Err(format!("{what} has the shape {shape:?}, with a dimension of 0"));
        }
        let (ggml, offset) = (self.u32(&what)?, self.u64(&what)?);
        Ok((name, Listed { shape, ggml, offset }))
    }
}

/// The f64 that is written the same (1e-6, not 9.999999974752427e-7).
fn widen(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

// The elements of a list are of the type that its header states.

fn float(value: Value) -> f32 {
    if let Value::Float(value) = value { value as f32 } else { f32::NAN }
}

fn boolean(value: Value) -> bool {
    value == Value::Bool(true)
}

fn string(value: Value) -> String {
    if let Value::String(text) = value { text } else { String::new() }
}

fn small(value: Value) -> i64 {
    if let Value::Integer(value) = value { i64::try_from(value).unwrap_or(i64::MAX) } else { 0 }
}
