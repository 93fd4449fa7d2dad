//! Weight formats: to and from f32, row by row. A format a file.
//!
//! Owns the block layouts of ggml (`ggml-common.h`, little-endian) and a
//! quantizer of our own for each: weighted least squares over candidate scales,
//! then a refit of what the block stores (`fit`, `affine`). Refuses values that
//! are not finite, or too large for a format's f16 scale.
//! Invariant: a row is `DType::row_bytes(cols)` bytes, its last block padded
//! with zeros.

mod affine;
mod finite;
mod fit;
mod plain;
mod q4_k;
mod q5_0;
mod q5_k;
mod q6_k;
mod q8_0;
#[cfg(test)]
mod tests;

pub use finite::first_not_finite;

use doppler_store::DType;

/// The largest weight a quantized format takes: its scales are f16, and no
/// weight of a working model comes near.
pub const MAGNITUDE_MAX: f32 = 5e5;

/// Why a row was not quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    #[error("element {column} is {value}, which is not finite")]
    NotFinite { column: usize, value: f32 },
    #[error("element {column} is {value}, too large for {dtype}")]
    TooLarge { column: usize, value: f32, dtype: DType },
}

/// Writes the `cols` weights of one row of `bytes` into `out`.
///
/// # Panics
/// If `bytes` is not `dtype.row_bytes(cols)` long or `out` not `cols`: shapes
/// are checked where a tensor is opened.
pub fn dequantize(dtype: DType, bytes: &[u8], cols: usize, out: &mut [f32]) {
    assert_eq!(bytes.len(), dtype.row_bytes(cols), "a {dtype} row of {cols}");
    assert_eq!(out.len(), cols, "the row's output");
    match dtype {
        DType::F32 => plain::read_f32(bytes, out),
        DType::F16 => plain::read_f16(bytes, out),
        DType::Bf16 => plain::read_bf16(bytes, out),
        DType::Q4K => read_blocks(bytes, out, q4_k::read),
        DType::Q5K => read_blocks(bytes, out, q5_k::read),
        DType::Q6K => read_blocks(bytes, out, q6_k::read),
        DType::Q8_0 => read_blocks(bytes, out, q8_0::read),
        DType::Q5_0 => read_blocks(bytes, out, q5_0::read),
    }
}

/// Appends one row in `dtype` to `out`: exactly `dtype.row_bytes(row.len())`
/// bytes, or nothing on an error.
pub fn quantize(dtype: DType, row: &[f32], out: &mut Vec<u8>) -> Result<(), QuantizeError> {
    let limit = match dtype {
        DType::F32 => f32::MAX,
        // The largest finite values of the type, and those that round to them.
        DType::F16 => 65_519.996,
        DType::Bf16 => 3.396e38,
        _ => MAGNITUDE_MAX,
    };
    for (column, &value) in row.iter().enumerate() {
        if !value.is_finite() {
            return Err(QuantizeError::NotFinite { column, value });
        }
        if value.abs() > limit {
            return Err(QuantizeError::TooLarge { column, value, dtype });
        }
    }
    match dtype {
        DType::F32 => plain::write_f32(row, out),
        DType::F16 => plain::write_f16(row, out),
        DType::Bf16 => plain::write_bf16(row, out),
        DType::Q4K => write_blocks(row, out, q4_k::write),
        DType::Q5K => write_blocks(row, out, q5_k::write),
        DType::Q6K => write_blocks(row, out, q6_k::write),
        DType::Q8_0 => write_blocks(row, out, q8_0::write),
        DType::Q5_0 => write_blocks(row, out, q5_0::write),
    }
    Ok(())
}

/// Reads blocks of `BYTES` bytes for `LEN` weights; the last may be padding in part.
fn read_blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    read: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    for (block, out) in blocks.iter().zip(out.chunks_mut(LEN)) {
        if let Ok(out) = <&mut [f32; LEN]>::try_from(&mut *out) {
            read(block, out);
        } else {
            let mut whole = [0.0; LEN];
            read(block, &mut whole);
            out.copy_from_slice(&whole[..out.len()]);
        }
    }
}

/// Writes blocks of `LEN` weights, the last one padded with zeros.
fn write_blocks<const BYTES: usize, const LEN: usize>(
    row: &[f32],
    out: &mut Vec<u8>,
    write: impl Fn(&[f32; LEN]) -> [u8; BYTES],
) {
    for weights in row.chunks(LEN) {
        let mut whole = [0.0; LEN];
        whole[..weights.len()].copy_from_slice(weights);
        out.extend_from_slice(&write(&whole));
    }
}
