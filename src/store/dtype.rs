//! Element types of stored tensors: names, block geometry, row sizes.
//!
//! A quantised row is a whole number of blocks: a row whose length is not a
//! multiple of the block length is padded (RDRR `layout: "row"`).
//! Block formats are those of ggml (`ggml-common.h`), little-endian.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    F32,
    F16,
    Bf16,
    /// 256 weights in 144 bytes: f16 d, f16 dmin, 12 B of 6-bit scales and mins, 128 B of nibbles.
    Q4K,
    /// 256 weights in 176 bytes: as Q4_K, with 32 B of fifth bits before the nibbles.
    Q5K,
    /// 256 weights in 210 bytes: 128 B low nibbles, 64 B high bits, 16 i8 scales, f16 d.
    Q6K,
    /// 32 weights in 34 bytes: f16 d, 32 i8.
    Q8_0,
    /// 32 weights in 22 bytes: f16 d, 4 B of fifth bits, 16 B of nibbles.
    Q5_0,
}

/// A tensor type this build does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tensor type {0:?} (known: F32, F16, BF16, Q4_K_M, Q5_K, Q6_K, Q8_0, Q5_0)")]
pub struct UnknownDType(pub String);

impl DType {
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q4K, Self::Q5K, Self::Q6K, Self::Q8_0, Self::Q5_0];

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            Self::Q8_0 | Self::Q5_0 => 32,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Q8_0 => 34,
            Self::Q5_0 => 22,
        }
    }

    /// Bytes of a row of `cols` weights, padded to whole blocks.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    pub const fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// The name written to a manifest. RDRR calls Q4_K blocks `Q4_K_M`.
    pub const fn rdrr_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4K => "Q4_K_M",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Q8_0 => "Q8_0",
            Self::Q5_0 => "Q5_0",
        }
    }

    /// Parses a type name of a manifest or safetensors file. `Q4_K` and `Q4_K_M` both mean
    /// Q4_K blocks.
    pub fn from_name(name: &str) -> Result<Self, UnknownDType> {
        if name == "Q4_K" {
            return Ok(Self::Q4K);
        }
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.rdrr_name() == name)
            .ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q4K => "Q4_K",
            other => other.rdrr_name(),
        })
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
        }
        assert_eq!(DType::from_name("Q4_K"), Ok(DType::Q4K));
        assert_eq!(DType::from_name("Q3_K"), Err(UnknownDType("Q3_K".into())));
    }
}
