//! `out[T, cols] = table[token] * scale`.

use super::matrix::Matrix;

/// `table` is `[vocab, cols]`; every token is less than `vocab`.
pub fn embed(tokens: &[u32], table: Matrix<'_>, scale: f32, out: &mut [f32]) {
    for (token, out) in tokens.iter().zip(out.chunks_exact_mut(table.cols)) {
        table.unpack_row(*token as usize, out);
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }
}
