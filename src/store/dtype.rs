//! Element types of stored tensors: names, block geometry, row sizes, all of them from the table
//! of `formats`.
//!
//! A quantised row is a whole number of blocks: a row whose length is not a
//! multiple of the block length is padded (RDRR `layout: "row"`).
//! Block formats are those of ggml (`ggml-common.h`), little-endian.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A row of the table.
struct Row {
    name: &'static str,
    rdrr_name: &'static str,
    file: &'static str,
    block_len: usize,
    block_bytes: usize,
}

/// Makes [`DType`] of the table.
macro_rules! dtypes {
    (
        $($kind:ident {
            $($(#[$doc:meta])* $variant:ident $file:ident $name:literal $rdrr:literal $len:literal $bytes:literal,)*
        })*
    ) => {
        /// How a tensor's elements are stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DType {
            $($($(#[$doc])* $variant,)*)*
        }

        /// The table, in the order of the variants.
        const ROWS: [Row; COUNT] = [$($(Row {
            name: $name,
            rdrr_name: $rdrr,
            file: stringify!($file),
            block_len: $len,
            block_bytes: $bytes,
        },)*)*];
        const COUNT: usize = [$($($name,)*)*].len();

        impl DType {
            /// Every format, in the order of the table.
            pub const ALL: [Self; COUNT] = [$($(Self::$variant,)*)*];
        }
    };
}

crate::formats!(dtypes);

macro_rules! pairs {
    ($($first:ident $second:ident,)*) => {
        impl DType {
            /// Formats that a mixture gives matrices which are read together.
            pub const TOGETHER: &[[Self; 2]] = &[$([Self::$first, Self::$second],)*];
        }
    };
}

crate::formats_together!(pairs);

/// A tensor type this build does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownDType(pub String);

impl fmt::Display for UnknownDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: Vec<&str> = DType::ALL.iter().map(|dtype| dtype.rdrr_name()).collect();
        write!(f, "unknown tensor type {:?} (known: {})", self.0, known.join(", "))
    }
}

impl std::error::Error for UnknownDType {}

impl DType {
    const fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        self.row().block_len
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        self.row().block_bytes
    }

    /// Bytes of a row of `cols` weights, padded to whole blocks.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    pub const fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// The name, for people.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The name written to a manifest. RDRR calls Q4_K blocks `Q4_K_M`.
    pub const fn rdrr_name(self) -> &'static str {
        self.row().rdrr_name
    }

    /// What its files are called, and its part of a kernel's name: `q4_k`.
    pub const fn file_name(self) -> &'static str {
        self.row().file
    }

    /// Parses a type name of a manifest or safetensors file. `Q4_K` and `Q4_K_M` both mean
    /// Q4_K blocks.
    pub fn from_name(name: &str) -> Result<Self, UnknownDType> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.rdrr_name() == name || dtype.name() == name)
            .ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for DType {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.rdrr_name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_name(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(DType::Q4K.row_bytes(256), 144);
        assert_eq!(DType::Q4K.row_bytes(257), 288);
        assert_eq!(DType::Q8_0.row_bytes(64), 68);
        assert_eq!(DType::Bf16.row_bytes(3), 6);
    }

    #[test]
    fn names_round_trip_and_unknown_ones_are_named() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.rdrr_name()), Ok(dtype));
            assert_eq!(DType::from_name(dtype.name()), Ok(dtype));
            assert_eq!(dtype.file_name(), dtype.name().to_ascii_lowercase());
        }
        assert_eq!(DType::from_name("Q4_K"), Ok(DType::Q4K));
        let unknown = DType::from_name("Q3_K").unwrap_err();
        assert_eq!(unknown, UnknownDType("Q3_K".into()));
        assert!(unknown.to_string().contains("(known: F32, F16, BF16, Q4_K_M, "), "{unknown}");
    }
}
