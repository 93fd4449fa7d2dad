//! Adds up a product's parts, each over some of the columns.

/// `parts` are `[T, rows]` each, in their order; `bias` `[rows]`; returns `[T, rows]`.
pub fn sum_parts(parts: &[&[f32]], bias: Option<&[f32]>) -> Vec<f32> {
    let mut sums = vec![0.0; parts.first().map_or(0, |part| part.len())];
    for part in parts {
        sums.iter_mut().zip(*part).for_each(|(sum, part)| *sum += part);
    }
    if let Some(bias) = bias.filter(|bias| !bias.is_empty()) {
        for row in sums.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
        }
    }
    sums
}
