//! Copies the wanted rows of states into the result.

/// The rows of `x`, `[T, width]`, from number `first` on.
pub fn states(x: &[f32], width: usize, first: usize, result: &mut Vec<f32>) {
    result.clear();
    result.extend_from_slice(&x[first * width..]);
}
