//! Whether stored weights are finite, without unpacking them.
//!
//! For plain formats each value is checked; for blocks only the scales, because integers times a
//! finite scale are finite. This runs wherever weights enter (conversion, loading, filling an
//! expert's slot), so it is one pass over plain formats and reads a few bytes per block of the
//! others.

use doppler_store::DType;
use half::{bf16, f16};

use super::{QuantizeError, layout};

/// Values checked together, so that the loop is vectorised.
const TOGETHER: usize = 64;

/// The first weight that is not finite, in whole rows of `cols` weights: its row, and the error
/// that names its column.
pub fn first_not_finite(dtype: DType, cols: usize, bytes: &[u8]) -> Option<(usize, QuantizeError)> {
    let (index, value) = match dtype {
        DType::F32 => first(bytes.as_chunks().0, |b| f32::from_le_bytes(*b))?,
        DType::F16 => first(bytes.as_chunks().0, |b| f16::from_le_bytes(*b).to_f32_const())?,
        DType::Bf16 => first(bytes.as_chunks().0, |b| bf16::from_le_bytes(*b).to_f32_const())?,
        blocked => {
            let blocks = bytes.chunks_exact(dtype.block_bytes());
            let of_row = cols.div_ceil(dtype.block_len());
            let scales = layout(blocked).halves;
            let found = blocks.enumerate().find_map(|(number, block)| {
                let scale = |at: &usize| u16::from_le_bytes([block[*at], block[at + 1]]);
                let bad = scales.iter().map(scale).find(|bits| bits & 0x7c00 == 0x7c00)?;
                Some((number, f16::from_bits(bad).to_f32()))
            });
            let (block, value) = found?;
            let (row, column) = (block / of_row, block % of_row * dtype.block_len());
            return Some((row, QuantizeError::NotFinite { column, value }));
        }
    };
    Some((index / cols, QuantizeError::NotFinite { column: index % cols, value }))
}

/// The first value that is not finite, and its index.
fn first<const N: usize>(
    values: &[[u8; N]],
    read: impl Fn(&[u8; N]) -> f32,
) -> Option<(usize, f32)> {
    let bad = |value: &[u8; N]| !read(value).is_finite();
    let start = values
        .chunks(TOGETHER)
        .position(|some| some.iter().fold(false, |any, value| any | bad(value)))?;
    let start = start * TOGETHER;
    let at = start + values[start..].iter().position(bad)?;
    Some((at, read(&values[at])))
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    #[test]
    fn every_type_tells_where_its_first_bad_weight_is() {
        let cols = 512;
        for dtype in DType::ALL {
            let row: Vec<f32> = (0..cols).map(|i| (i as f32 - 200.0) / 64.0).collect();
            let mut bytes = Vec::new();
            for _ in 0..3 {
                quantize(dtype, &row, &mut bytes).unwrap();
            }
            assert_eq!(first_not_finite(dtype, cols, &bytes), None, "{dtype}");
            let (row_bytes, block) = (dtype.row_bytes(cols), dtype.block_bytes());
            let number = 300 / dtype.block_len();
            let at = row_bytes + number * block;
            let places = if dtype.is_quantised() { layout(dtype).halves } else { &[0] };
            for place in places {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut bytes = bytes.clone();
                    let at = at + place;
                    match dtype {
                        DType::F32 => bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes()),
                        DType::Bf16 => {
                            bytes[at..at + 2].copy_from_slice(&bf16::from_f32(bad).to_le_bytes());
                        }
                        _ => bytes[at..at + 2].copy_from_slice(&f16::from_f32(bad).to_le_bytes()),
                    }
                    let (row, error) = first_not_finite(dtype, cols, &bytes).unwrap();
                    let QuantizeError::NotFinite { column, value } = error else { panic!() };
                    assert_eq!((row, column), (1, number * dtype.block_len()), "{dtype}");
                    assert!(!value.is_finite());
                }
            }
        }
    }
}
