//! Rotary position embedding, "rotate half" form (Su et al., 2021).
//!
//! Pair `i` of a head is `(x[i], x[i + half])`, rotated by `position * inv_freq[i]`.

use crate::graph::Rope;

/// Sines and cosines for the positions of a batch, `[T, half]` each, multiplied by the
/// attention factor.
#[derive(Debug, Clone, Default)]
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// `long` is the form for long sequences.
    pub fn new(rope: &Rope, long: bool, positions: impl Iterator<Item = usize>) -> Self {
        let mut angles = Self::default();
        for p in positions {
            for freq in rope.form(long) {
                let (sin, cos) = (p as f32 * freq).sin_cos();
                angles.cos.push(cos * rope.attention_factor);
                angles.sin.push(sin * rope.attention_factor);
            }
        }
        angles
    }
}

/// Rotates `x [T, heads, head_dim]` in place; elements past `2 * half` pass through.
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, half: usize, angles: &Angles) {
    let rows = x.chunks_exact_mut(heads * head_dim);
    let rotations = angles.cos.chunks_exact(half).zip(angles.sin.chunks_exact(half));
    for (row, (cos, sin)) in rows.zip(rotations) {
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] - b * sin[i];
                high[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}
