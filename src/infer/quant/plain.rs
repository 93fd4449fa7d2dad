//! Unblocked types: F32, F16 and BF16, little-endian. Narrowing rounds to the
//! nearest, ties to even.

use half::{bf16, f16};

pub fn read_f32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = f32::from_le_bytes(*bytes);
    }
}

pub fn read_f16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = f16::from_le_bytes(*bytes).to_f32();
    }
}

pub fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = bf16::from_le_bytes(*bytes).to_f32();
    }
}

pub fn write_f32(row: &[f32], out: &mut Vec<u8>) {
    out.extend(row.iter().flat_map(|x| x.to_le_bytes()));
}

pub fn write_f16(row: &[f32], out: &mut Vec<u8>) {
    out.extend(row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
}

pub fn write_bf16(row: &[f32], out: &mut Vec<u8>) {
    out.extend(row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
}
