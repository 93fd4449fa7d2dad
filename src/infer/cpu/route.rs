//! Router: from a token's logits to its experts and their weights.
//!
//! Choices are in order of descending logit, or of the score plus a bias, then ascending expert id. If a logit is not finite,
//! the weights are NaN, so that it shows in the model's output.

use crate::graph::Scoring;

/// `logits` is `[T, experts]`, `bias` `[experts]`; `ids` and `weights` are `[T, top_k]`, `top_k <=
/// experts`.
pub fn route(
    logits: &[f32],
    bias: Option<&[f32]>,
    experts: usize,
    scoring: Scoring,
    ids: &mut [u32],
    weights: &mut [f32],
    top_k: usize,
) {
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    let mut keys: Vec<f32> = Vec::with_capacity(experts);
    let choices = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
    for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(choices) {
        keys.clear();
        match bias {
            Some(bias) if scoring != Scoring::Scaled => {
                let score = Score::new(logits, scoring);
                let key = |(l, bias): (&f32, &f32)| rank(score.of(rank(*l)) / score.total + bias);
                keys.extend(logits.iter().zip(bias).map(key));
            }
            _ => keys.extend(logits.iter().map(|logit| rank(*logit))),
        }
        if let Scoring::Grouped { groups, kept, .. } = scoring {
            limit(&mut keys, groups as usize, kept as usize);
        }
        order.clear();
        order.extend(0..experts as u32);
        let better =
            |a: &u32, b: &u32| keys[*b as usize].total_cmp(&keys[*a as usize]).then(a.cmp(b));
        if top_k < experts {
            order.select_nth_unstable_by(top_k, better);
        }
        order[..top_k].sort_unstable_by(better);
        ids.copy_from_slice(&order[..top_k]);
        weigh(logits, scoring, ids, weights);
        if let (Some(factors), Scoring::Scaled) = (bias, scoring) {
            let factor = |id: &u32| factors[*id as usize];
            weights.iter_mut().zip(&*ids).for_each(|(weight, id)| *weight *= factor(id));
        }
    }
}

/// Sets the keys of all but the `kept` best of `groups` groups of neighbours to 0. A group is as good
/// as the sum of its two best keys; of equals, the first is better.
fn limit(keys: &mut [f32], groups: usize, kept: usize) {
    let each = keys.len() / groups;
    let sum = |keys: &[f32]| {
        let mut best = [f32::NEG_INFINITY; 2];
        for key in keys {
            best = [best[0].max(*key), best[1].max(best[0].min(*key))];
        }
        best[0] + best[1]
    };
    let sums: Vec<f32> = keys.chunks_exact(each).map(sum).collect();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]).then(a.cmp(b)));
    for group in &order[kept..] {
        keys[group * each..][..each].fill(0.0);
    }
}

/// As [`weigh`], for [`Scoring::Mixer`].
fn mix(logits: &[f32], jitter: f32, ids: &[u32], weights: &mut [f32]) {
    let sound = logits.iter().all(|logit| logit.is_finite());
    for (choice, weight) in weights.iter_mut().enumerate() {
        let best = logits[ids[choice] as usize];
        let others = (0..).zip(logits).filter(|(id, _)| !ids[..choice].contains(id));
        let close = |l: f32| best - l <= 2.0 * jitter * l.abs().max(best);
        let sum: f32 = others.filter(|(_, l)| close(**l)).map(|(_, l)| (l - best).exp()).sum();
        *weight = if sound { 1.0 / sum } else { f32::NAN };
    }
}

/// The routing weights of the chosen experts.
fn weigh(logits: &[f32], scoring: Scoring, ids: &[u32], weights: &mut [f32]) {
    if let Scoring::Mixer { jitter } = scoring {
        return mix(logits, jitter, ids, weights);
    }
    let score = Score::new(logits, scoring);
    for (weight, id) in weights.iter_mut().zip(ids) {
        *weight = score.of(logits[*id as usize]);
    }
    let chosen: f32 = weights.iter().sum();
    let (sum, scale) = match scoring {
        Scoring::Softmax { renormalise: true } | Scoring::Scaled => (chosen, 1.0),
        Scoring::Softmax { renormalise: false } => (score.total, 1.0),
        // Transformers adds the same to the sum.
        Scoring::Sigmoid { renormalise: true, scale }
        | Scoring::Grouped { renormalise: true, scale, .. } => (chosen + 1e-20, scale),
        Scoring::Sigmoid { renormalise: false, scale }
        | Scoring::Grouped { renormalise: false, scale, .. } => (1.0, scale),
        Scoring::Mixer { .. } => (1.0, 1.0),
    };
    let sum = if logits.iter().all(|logit| logit.is_finite()) { sum } else { f32::NAN };
    weights.iter_mut().for_each(|weight| *weight = *weight / sum * scale);
}

/// A token's scores before they are divided by a total.
struct Score {
    sigmoid: bool,
    max: f32,
    /// Of all scores of a softmax; 1 for sigmoids.
    total: f32,
}

impl Score {
    fn new(logits: &[f32], scoring: Scoring) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sigmoid = !matches!(scoring, Scoring::Softmax { .. } | Scoring::Scaled);
        let mut score = Self { sigmoid, max, total: 1.0 };
        if !sigmoid {
            score.total = logits.iter().map(|logit| score.of(rank(*logit))).sum();
        }
        score
    }

    fn of(&self, logit: f32) -> f32 {
        if self.sigmoid { 1.0 / (1.0 + (-logit).exp()) } else { (logit - self.max).exp() }
    }
}

/// The value by which a logit or a score is ordered: the two zeros tie, and NaN comes last.
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
        route(&[f32::NAN, -0.0, 0.0, -1.0], None, 4, scoring, &mut ids, &mut weights, 3);
        assert_eq!(ids, [1, 2, 3]);
        assert!(weights.iter().all(|weight| weight.is_nan()));
        let scoring = Scoring::Softmax { renormalise: false };
        route(
            &[1.0, f32::NEG_INFINITY, 0.0],
            None,
            3,
            scoring,
            &mut ids[..2],
            &mut weights[..2],
            2,
        );
        assert_eq!(ids[..2], [0, 2]);
        assert!(weights[..2].iter().all(|weight| weight.is_nan()));
    }

    #[test]
    fn a_factor_weighs_and_does_not_choose() {
        let (mut ids, mut weights) = ([9; 2], [0.0; 2]);
        let factors = [100.0, 2.0, 1.0, 4.0];
        route(&[0.0, 2.0, 1.0, 2.0], Some(&factors), 4, Scoring::Scaled, &mut ids, &mut weights, 2);
        assert_eq!((ids, weights), ([1, 3], [1.0, 2.0]));
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        let logit = |score: f32| (score / (1.0 - score)).ln();
        // Sums of the two best, with the bias: 1.1, 1.3, 0.9, 1.15.
        let scores = [0.9, 0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.1, 0.0001, 0.3, 0.3, 0.4];
        let bias = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.45];
        let logits = scores.map(logit);
        let chosen = |groups, kept, top_k| {
            let (mut ids, mut weights) = (vec![9; top_k], vec![0.0; top_k]);
            let scoring = Scoring::Grouped { renormalise: false, scale: 1.0, groups, kept };
            route(&logits, Some(&bias), 12, scoring, &mut ids, &mut weights, top_k);
            for (id, weight) in ids.iter().zip(weights) {
                assert!((weight - scores[*id as usize]).abs() < 1e-5);
            }
            ids
        };
        assert_eq!(chosen(4, 2, 2), [11, 5]);
        assert_eq!(chosen(4, 1, 3), [5, 4, 3]);
        assert_eq!(chosen(4, 4, 3), [0, 11, 6]);
        // What is left when all of the best group are chosen scores 0, in order of its number.
        assert_eq!(chosen(4, 1, 4), [5, 4, 3, 0]);
        assert_eq!(chosen(2, 1, 2), [11, 6]);
    }

    #[test]
    fn a_mixer_weighs_each_choice_among_those_close_to_it() {
        let (mut ids, mut weights) = ([9; 2], [0.0; 2]);
        let scoring = Scoring::Mixer { jitter: 0.01 };
        route(&[2.0, 1.99, 0.5, 1.97], None, 4, scoring, &mut ids, &mut weights, 2);
        assert_eq!(ids, [0, 1]);
        let first = 1.0 / (1.0 + (-0.01_f32).exp() + (-0.03_f32).exp());
        let second = 1.0 / (1.0 + (-0.02_f32).exp());
        assert!((weights[0] - first).abs() < 1e-6 && (weights[1] - second).abs() < 1e-6);
        route(&[-0.5, 3.0, 1.0, -4.0], None, 4, scoring, &mut ids, &mut weights, 2);
        assert_eq!((ids, weights), ([1, 2], [1.0, 1.0]));
    }

    #[test]
    fn a_bias_chooses_but_does_not_weigh() {
        let (mut ids, mut weights) = ([9; 2], [0.0; 2]);
        let (logits, bias) = ([0.0, 2.0, -1.0, 1.0], [0.0, 0.0, 1.0, -0.5]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let scoring = Scoring::Sigmoid { renormalise: true, scale: 2.5 };
        route(&logits, Some(&bias), 4, scoring, &mut ids, &mut weights, 2);
        assert_eq!(ids, [2, 1]);
        let (a, b) = (sigmoid(-1.0), sigmoid(2.0));
        assert!((weights[0] - 2.5 * a / (a + b)).abs() < 1e-6, "{weights:?}");
        let scoring = Scoring::Sigmoid { renormalise: false, scale: 1.0 };
        route(&logits, None, 4, scoring, &mut ids, &mut weights, 2);
        assert_eq!((ids, weights), ([1, 3], [sigmoid(2.0), sigmoid(1.0)]));
        // Of the softmax: 0.087, 0.644, 0.032, 0.237.
        let scoring = Scoring::Softmax { renormalise: true };
        route(&logits, Some(&[0.5, 0.0, 0.0, 0.3]), 4, scoring, &mut ids, &mut weights, 2);
        assert_eq!(ids, [1, 0]);
        assert!((weights[0] - 1.0 / (1.0 + (-2.0_f32).exp())).abs() < 1e-6, "{weights:?}");
    }
}
