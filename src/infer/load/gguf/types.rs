//! ggml's tensor types: how many weights and bytes a block has, and how each is held here.
//!
//! A type of the format table is held bit for bit. Of the others, three are held exactly in another
//! block format (a block of Q3_K is one of Q6_K with fewer levels, and so on), and three as F32,
//! because no block format here has their groups. So reading a GGUF file never rounds a weight.
//! Types that cannot be decoded are refused by name. Numbers and geometry: `ggml.h`,
//! `ggml-common.h`.

use std::fmt;

use super::blocks::{self, Convert};
use super::header::Value;
use doppler_store::DType;

/// A type that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgmlType(usize);

/// How a type is held here.
#[derive(Debug, Clone, Copy)]
pub enum Held {
    /// As it is.
    Same(DType),
    /// In another type. Each block of the file becomes this many bytes.
    As(DType, Convert),
}

struct Row {
    number: u32,
    name: &'static str,
    /// Weights in a block.
    len: u64,
    /// Bytes of a block.
    bytes: u64,
    held: Held,
}

const fn same(number: u32, name: &'static str, len: u64, bytes: u64, dtype: DType) -> Row {
    Row { number, name, len, bytes, held: Held::Same(dtype) }
}

const fn other(
    number: u32,
    name: &'static str,
    (len, bytes): (u64, u64),
    dtype: DType,
    convert: Convert,
) -> Row {
    Row { number, name, len, bytes, held: Held::As(dtype, convert) }
}

const READABLE: [Row; 16] = [
    same(0, "F32", 1, 4, DType::F32),
    same(1, "F16", 1, 2, DType::F16),
    same(30, "BF16", 1, 2, DType::Bf16),
    same(3, "Q4_1", 32, 20, DType::Q4_1),
    same(6, "Q5_0", 32, 22, DType::Q5_0),
    same(8, "Q8_0", 32, 34, DType::Q8_0),
    same(12, "Q4_K", 256, 144, DType::Q4K),
    same(13, "Q5_K", 256, 176, DType::Q5K),
    same(14, "Q6_K", 256, 210, DType::Q6K),
    same(39, "MXFP4", 32, 17, DType::Mxfp4),
    other(2, "Q4_0", (32, 18), DType::Q4_1, blocks::q4_0),
    other(11, "Q3_K", (256, 110), DType::Q6K, blocks::q3_k),
    other(20, "IQ4_NL", (32, 18), DType::Q8_0, blocks::iq4_nl),
    other(7, "Q5_1", (32, 24), DType::F32, blocks::q5_1),
    other(10, "Q2_K", (256, 84), DType::F32, blocks::q2_k),
    other(23, "IQ4_XS", (256, 136), DType::F32, blocks::iq4_xs),
];

/// Types that are known but cannot be decoded here.
const UNREADABLE: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// What `general.file_type` calls the mixture of a file's types (`llama_ftype`).
pub fn file_type(number: Option<&Value>) -> &'static str {
    const NAMES: &[(i128, &str)] = &[
        (2, "Q4_0"),
        (3, "Q4_1"),
        (7, "Q8_0"),
        (8, "Q5_0"),
        (9, "Q5_1"),
        (10, "Q2_K"),
        (11, "Q3_K_S"),
        (12, "Q3_K_M"),
        (13, "Q3_K_L"),
        (14, "Q4_K_S"),
        (15, "Q4_K_M"),
        (16, "Q5_K_S"),
        (17, "Q5_K_M"),
        (18, "Q6_K"),
        (21, "Q2_K_S"),
        (25, "IQ4_NL"),
        (30, "IQ4_XS"),
        (38, "MXFP4"),
    ];
    let name = NAMES.iter().find(|(known, _)| number == Some(&Value::Integer(*known)));
    name.map_or("mixed", |(_, name)| name)
}

impl GgmlType {
    /// The type of this number.
    ///
    /// # Errors
    /// If it is unknown or cannot be decoded.
    pub fn of(number: u32) -> Result<Self, String> {
        if let Some(index) = READABLE.iter().position(|row| row.number == number) {
            return Ok(Self(index));
        }
        let known: Vec<&str> = READABLE.iter().map(|row| row.name).collect();
        let known = known.join(", ");
        Err(match UNREADABLE.iter().find(|(other, _)| *other == number) {
            Some((_, name)) => format!("its type {name} cannot be read (known: {known})"),
            None => format!("its type {number} is unknown (known: {known})"),
        })
    }

    /// The number of the type whose blocks are exactly those of a type here. `None` if there is none.
    pub fn number_of(dtype: DType) -> Option<u32> {
        let same = |row: &&Row| matches!(row.held, Held::Same(held) if held == dtype);
        READABLE.iter().find(same).map(|row| row.number)
    }

    /// Weights and bytes of a block.
    pub const fn block(self) -> (u64, u64) {
        let row = &READABLE[self.0];
        (row.len, row.bytes)
    }

    pub const fn held(self) -> Held {
        READABLE[self.0].held
    }

    /// Every type that can be read.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Self> {
        (0..READABLE.len()).map(Self)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(READABLE[self.0].name)
    }
}
