//! `kernels/copy.wgsl`: copies bytes, to measure bandwidth.

/// `result = source`, over the shorter length.
pub fn copy(source: &[u32], result: &mut [u32]) {
    let count = source.len().min(result.len());
    result[..count].copy_from_slice(&source[..count]);
}
