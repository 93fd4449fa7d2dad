//! Router: from a token's logits to its experts and their weights.
//!
//! Choices are in order of descending logit, then ascending expert id. If a logit is not finite,
//! the weights are NaN, so that it shows in the model's output.

use crate::graph::Scoring;

/// `logits` is `[T, experts]`; `ids` and `weights` are `[T, top_k]`, `top_k <= experts`.
pub fn route(
    logits: &[f32],
    experts: usize,
    scoring: Scoring,
    ids: &mut [u32],
    weights: &mut [f32],
    top_k: usize,
) {
    let Scoring::Softmax { renormalise } = scoring;
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    let choices = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
    for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(choices) {
        order.clear();
        order.extend(0..experts as u32);
        let better = |a: &u32, b: &u32| {
            rank(logits[*b as usize]).total_cmp(&rank(logits[*a as usize])).then(a.cmp(b))
        };
        if top_k < experts {
            order.select_nth_unstable_by(top_k, better);
        }
        order[..top_k].sort_unstable_by(better);
        ids.copy_from_slice(&order[..top_k]);
        let max = logits[ids[0] as usize];
        for (weight, id) in weights.iter_mut().zip(&*ids) {
            *weight = (logits[*id as usize] - max).exp();
        }
        let sum: f32 = match renormalise {
            true => weights.iter().sum(),
            false => logits.iter().map(|logit| (logit - max).exp()).sum(),
        };
        let sum = if logits.iter().all(|logit| logit.is_finite()) { sum } else { f32::NAN };
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

/// The value by which a logit is ordered: the two zeros tie, and NaN comes last.
fn rank(logit: f32) -> f32 {
    // Adding zero turns -0 into 0.
    if logit.is_nan() { f32::NEG_INFINITY } else { logit + 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_tie_and_what_is_no_number_comes_last() {
        let (mut ids, mut weights) = ([9; 3], [0.0; 3]);
        let scoring = Scoring::Softmax { renormalise: true };
        route(&[f32::NAN, -0.0, 0.0, -1.0], 4, scoring, &mut ids, &mut weights, 3);
        assert_eq!(ids, [1, 2, 3]);
        assert!(weights.iter().all(|weight| weight.is_nan()));
        let scoring = Scoring::Softmax { renormalise: false };
        route(&[1.0, f32::NEG_INFINITY, 0.0], 3, scoring, &mut ids[..2], &mut weights[..2], 2);
        assert_eq!(ids[..2], [0, 2]);
        assert!(weights[..2].iter().all(|weight| weight.is_nan()));
    }
}
