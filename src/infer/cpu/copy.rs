//! `kernels/copy.wgsl`: moves bytes, to see how fast that is.

/// `result = source`, as far as both go.
pub fn copy(source: &[u32], result: &mut [u32]) {
    let count = source.len().min(result.len());
    result[..count].copy_from_slice(&source[..count]);
}
