//! Whether stored weights are finite, without unpacking them.
//!
//! For plain formats each value is checked; for blocks only the scales, because integers times a
//! finite f16 are finite. Blocks whose scale is a power of two so large that it may overflow are
//! unpacked. This runs wherever weights enter (conversion, loading, filling an
//! expert's slot), so it is one pass over plain formats and reads a few bytes per block of the
//! others.

use doppler_store::DType;
use half::{bf16, f16};

use super::{QuantizeError, Scales, dequantize, layout};

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
            let scales = layout(blocked).scales;
            let found = blocks
                .enumerate()
                .find_map(|(number, block)| Some((number, bad_scale(blocked, scales, block)?)));
            let (block, value) = found?;
            let (row, column) = (block / of_row, block % of_row * dtype.block_len());
            return Some((row, QuantizeError::NotFinite { column, value }));
        }
    };
    Some((index / cols, QuantizeError::NotFinite { column: index % cols, value }))
}

/// The largest exponent of a scale that no level brings beyond f32: `6 * 2^125` is finite.
const EXPONENT_SAFE: u8 = 252;

/// Whether an f32 is far from infinite, and none of the bytes after it is NaN (e4m3).
fn is_sound(scaled: &[u8]) -> bool {
    let (scale, bytes) = scaled.split_first_chunk().expect("a scale");
    let nan = bytes.iter().fold(false, |any, byte| any | (byte & 0x7f == 0x7f));
    f32::from_le_bytes(*scale).abs() < 1e35 && !nan
}

/// A scale of a block that is not finite, or a weight that it makes infinite.
fn bad_scale(dtype: DType, scales: Scales, block: &[u8]) -> Option<f32> {
    match scales {
        Scales::Halves(places) => {
            let scale = |at: &usize| u16::from_le_bytes([block[*at], block[at + 1]]);
            let bad = places.iter().map(scale).find(|bits| bits & 0x7c00 == 0x7c00);
            bad.map(|bits| f16::from_bits(bits).to_f32())
        }
        Scales::Exponent(at) if block[at] <= EXPONENT_SAFE => None,
        Scales::Float(at) if is_sound(&block[at..]) => None,
        Scales::Exponent(_) | Scales::Float(_) => {
            let mut weights = vec![0.0; dtype.block_len()];
            dequantize(dtype, block, dtype.block_len(), &mut weights);
            weights.into_iter().find(|weight| !weight.is_finite())
        }
    }
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
            let places = match layout(dtype).scales {
                Scales::Halves(places) if dtype.is_quantised() => places,
                Scales::Halves(_) => &[0],
                // See the test below.
                Scales::Exponent(_) | Scales::Float(_) => &[],
            };
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

    /// What counts is whether a weight is infinite, however large its scale.
    #[test]
    fn a_power_of_two_is_bad_where_it_makes_a_weight_infinite() {
        let mut bytes = vec![0; DType::Mxfp4.row_bytes(128)];
        for (exponent, level, fine) in [
            (252, 7, true),
            (253, 5, true),
            (253, 6, false),
            (254, 3, true),
            (254, 0x0c, false),
            (255, 0, false),
        ] {
            (bytes[34], bytes[34 + 5]) = (exponent, level);
            let found = first_not_finite(DType::Mxfp4, 64, &bytes);
            assert_eq!(found.is_none(), fine, "2^{exponent} * {level}: {found:?}");
            let Some((row, error)) = found else { continue };
            let QuantizeError::NotFinite { column, value } = error else { panic!() };
            assert_eq!((row, column, value.is_finite()), (1, 0, false));
        }
    }

    #[test]
    fn a_number_or_a_scale_that_is_nan_is_found_among_bytes() {
        let mut bytes = Vec::new();
        for _ in 0..2 {
            quantize(DType::Fp8, &[0.5; 256], &mut bytes).unwrap();
        }
        assert_eq!(first_not_finite(DType::Fp8, 256, &bytes), None);
        for (at, with) in [
            (132 * 3 + 4 + 77, vec![0xff]),
            (132 * 3, f32::NAN.to_le_bytes().to_vec()),
            (132 * 3, 1e37_f32.to_le_bytes().to_vec()),
        ] {
            let mut bytes = bytes.clone();
            bytes[at..at + with.len()].copy_from_slice(&with);
            let (row, error) = first_not_finite(DType::Fp8, 256, &bytes).unwrap();
            let QuantizeError::NotFinite { column, value } = error else { panic!() };
            assert_eq!((row, column, value.is_finite()), (1, 128, false));
        }
    }
}
