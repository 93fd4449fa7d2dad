//! Copies some elements of each head from one row to another, whose other elements stay.

use crate::graph::Heads;

/// `x` and `out` have rows of the widths in `rows`. Of each of `heads` heads, `width` elements are
/// copied.
pub fn heads(
    (x, from): (&[f32], Heads),
    (out, to): (&mut [f32], Heads),
    rows: (usize, usize),
    heads: usize,
    width: usize,
) {
    for (x, out) in x.chunks_exact(rows.0).zip(out.chunks_exact_mut(rows.1)) {
        for head in 0..heads {
            let at = from.start + head * from.stride;
            out[to.start + head * to.stride..][..width].copy_from_slice(&x[at..at + width]);
        }
    }
}
