//! `out[T, cols] = table[token] * scale`, or `x[T, cols] += table[row]`.

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

/// Adds a row of `table` to each row of `x`.
pub fn embed_more(rows: &[u32], table: Matrix<'_>, x: &mut [f32]) {
    let mut added = vec![0.0; table.cols];
    for (row, x) in rows.iter().zip(x.chunks_exact_mut(table.cols)) {
        table.unpack_row(*row as usize, &mut added);
        x.iter_mut().zip(&added).for_each(|(x, added)| *x += added);
    }
}
