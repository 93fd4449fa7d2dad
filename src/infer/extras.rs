//! What a choice of a token takes besides a device's sampling: logit biases, presence and frequency
//! penalties, the form of the text, and the probabilities to report.
//!
//! Only the host does these. They are f32 sums in a fixed order, so the choice is still the same on
//! every machine. Reported probabilities are those of the model: before any bias, penalty and
//! temperature.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::grammar::Grammar;
use super::odds::Recipe;
use super::sampler::{SamplerError, SamplerOptions};

/// The most tokens whose logits are changed, and by how much.
pub const BIASES_MAX: usize = 1024;
pub const BIAS_MAX: f32 = 1000.0;
/// The most alternatives of which probabilities are reported.
pub const LOGPROBS_MAX: usize = 20;
/// The largest presence or frequency penalty.
pub const PENALTY_MAX: f32 = 100.0;

/// Options beyond numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Extras {
    /// Added to the logits of these tokens, before anything else.
    pub bias: Arc<[(u32, f32)]>,
    /// Report the probability of each chosen token and of this many of the likeliest.
    pub logprobs: Option<usize>,
    /// What the text must look like. Tokens that do not fit are never chosen.
    pub grammar: Option<Grammar>,
}

impl Extras {
    /// # Errors
    /// If there are too many, or a bias is out of range.
    pub fn check(&self) -> Result<(), SamplerError> {
        let Self { bias, logprobs, .. } = self;
        let fail = |name, value, want| Err(SamplerError { name, value, want });
        if bias.len() > BIASES_MAX {
            return fail("the number of logit biases", bias.len() as f32, "at most 1024");
        }
        // NaN is out of range, too.
        let good = |bias: f32| (-BIAS_MAX..=BIAS_MAX).contains(&bias);
        if let Some((_, bias)) = bias.iter().find(|(_, bias)| !good(*bias)) {
            return fail("a logit bias", *bias, "-1000 to 1000");
        }
        match logprobs {
            Some(count) if *count > LOGPROBS_MAX => {
                fail("logprobs", *count as f32, "at most 20 alternatives")
            }
            _ => Ok(()),
        }
    }

    /// The logits with biases and all penalties. `recent` are the tokens that count as repetitions.
    pub(super) fn adjust(
        &self,
        logits: &mut [f32],
        recent: &[u32],
        options: &SamplerOptions,
        recipe: &Recipe,
    ) {
        for (token, bias) in self.bias.iter() {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let mut recent = recent.to_vec();
        recent.sort_unstable();
        for same in recent.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(same[0] as usize) else { continue };
            if recipe.window > 0 {
                *logit = recipe.penalised(*logit);
            }
            *logit -= options.presence_penalty + options.frequency_penalty * same.len() as f32;
        }
    }
}

/// A token and the logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Logprob {
    pub token: u32,
    /// Natural; at most 0.
    pub logprob: f32,
}

/// How likely a chosen token was, and what else was likely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    pub chosen: Logprob,
    /// The likeliest first; of equals, the lower id.
    pub top: Vec<Logprob>,
}

impl Logprobs {
    /// Of `token` and the `count` likeliest, by the model's finite logits `[vocab]`.
    pub fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
        let all = f64::from(max) + sum.ln();
        let one = |token: u32| {
            let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
            Logprob { token, logprob: (f64::from(logit) - all) as f32 }
        };
        let mut top: Vec<u32> = Vec::with_capacity(count + 1);
        for (token, logit) in (0..).zip(logits) {
            let above = |other: &u32| logits[*other as usize] >= *logit;
            let place = top.partition_point(above);
            if place < count {
                top.insert(place, token);
                top.truncate(count);
            }
        }
        Self { chosen: one(token), top: top.into_iter().map(one).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Sampler;

    fn with(options: SamplerOptions, bias: &[(u32, f32)]) -> Sampler {
        Sampler::with(options, Extras { bias: bias.into(), ..Extras::default() }).unwrap()
    }

    const LOGITS: [f32; 5] = [1.0, 0.9, 0.5, -0.2, -3.0];

    fn greedy(sampler: &mut Sampler, n: usize) -> Vec<u32> {
        let mut next = || {
            let token = sampler.sample(&LOGITS);
            sampler.accept(token);
            token
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn biases_push_and_ban() {
        let base = SamplerOptions::default();
        assert_eq!(greedy(&mut with(base, &[(4, 5.0)]), 2), [4, 4]);
        assert_eq!(greedy(&mut with(base, &[(0, -1000.0), (1, -0.5)]), 1), [2]);
        assert_eq!(greedy(&mut with(base, &[(0, -0.05), (0, -0.06)]), 1), [1], "biases add up");
        let drawn = SamplerOptions { temperature: 1.0, ..base };
        let mut banned = with(drawn, &[(0, -1000.0), (2, -1000.0)]);
        assert!(greedy(&mut banned, 300).iter().all(|token| ![0, 2].contains(token)));
    }

    /// Worked out by hand from OpenAI's formula: logit - count * frequency - (count > 0) * presence.
    #[test]
    fn presence_counts_once_and_frequency_each_time() {
        let base = SamplerOptions::default();
        let presence = SamplerOptions { presence_penalty: 0.6, ..base };
        // 1.0 0.9 0.5 | 0.4 0.9 0.5 | 0.4 0.3 0.5 | 0.4 0.3 -0.1 | for good.
        assert_eq!(greedy(&mut with(presence, &[]), 6), [0, 1, 2, 0, 0, 0]);
        let frequency = SamplerOptions { frequency_penalty: 0.3, ..base };
        // 1.0 0.9 0.5 | 0.7 0.9 0.5 | 0.7 0.6 0.5 | 0.4 0.6 0.5 | 0.4 0.3 0.5 | 0.4 0.3 0.2
        assert_eq!(greedy(&mut with(frequency, &[]), 6), [0, 1, 0, 1, 2, 0]);
        // Only the last two tokens count.
        let window = SamplerOptions { repetition_window: 2, ..presence };
        assert_eq!(greedy(&mut with(window, &[]), 6), [0, 1, 2, 0, 1, 2]);
        let all = SamplerOptions { repetition_penalty: 2.0, frequency_penalty: 0.1, ..base };
        // 1.0 0.9 0.5 | 0.4 0.9 0.5 | 0.4 0.35 0.5 | 0.4 0.35 0.15 | 0.3 0.35 0.15
        assert_eq!(greedy(&mut with(all, &[]), 5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn min_p_keeps_what_is_near_the_likeliest() {
        let logits = [0.4_f32.ln(), 0.3_f32.ln(), 0.19_f32.ln(), 0.11_f32.ln()];
        let counts = |min_p: f32, top_p: f32, top_k: usize| {
            let base = SamplerOptions { temperature: 1.0, seed: 3, ..SamplerOptions::default() };
            let options = SamplerOptions { min_p, top_p, top_k, ..base };
            let mut sampler = Sampler::new(options).unwrap();
            assert_eq!(sampler.is_plain(), min_p == 0.0);
            let mut counts = [0; 4];
            (0..4000).for_each(|_| counts[sampler.sample(&logits) as usize] += 1);
            counts
        };
        let kept = |counts: [usize; 4]| counts.map(|count| count > 0);
        assert_eq!(kept(counts(0.0, 1.0, 0)), [true; 4]);
        assert_eq!(kept(counts(0.27, 1.0, 0)), [true; 4], "0.11 is 0.275 of 0.4");
        assert_eq!(kept(counts(0.28, 1.0, 0)), [true, true, true, false]);
        assert_eq!(kept(counts(0.5, 1.0, 0)), [true, true, false, false]);
        assert_eq!(kept(counts(1.0, 1.0, 0)), [true, false, false, false]);
        assert_eq!(kept(counts(0.5, 0.3, 0)), [true, false, false, false], "the narrower cut");
        assert_eq!(kept(counts(0.5, 0.999, 3)), [true, true, false, false]);
        // What remains is drawn in proportion: 4 to 3.
        let share = counts(0.5, 1.0, 0)[0] as f64 / 4000.0;
        assert!((share - 4.0 / 7.0).abs() < 0.03, "{share}");
    }

    #[test]
    fn probabilities_are_the_softmax_of_the_models_own_logits() {
        let logits = [0.5_f32.ln(), 0.25_f32.ln(), 0.25_f32.ln()];
        let told = Logprobs::of(&logits, 2, 2);
        let near = |got: Logprob, token: u32, p: f32| {
            assert!(got.token == token && (got.logprob - p.ln()).abs() < 1e-6, "{got:?}");
        };
        near(told.chosen, 2, 0.25);
        assert_eq!(told.top.len(), 2);
        near(told.top[0], 0, 0.5);
        near(told.top[1], 1, 0.25);
        assert!(Logprobs::of(&logits, 0, 0).top.is_empty());
        assert_eq!(Logprobs::of(&logits, 0, 20).top.len(), 3);
        // A bias changes the choice, not what is told of it.
        let extras = Extras { bias: [(2, 9.0)].into(), logprobs: Some(1), ..Extras::default() };
        let mut sampler = Sampler::with(SamplerOptions::default(), extras).unwrap();
        assert_eq!(sampler.sample(&logits), 2);
        assert_eq!(sampler.take_logprobs(), Some(Logprobs::of(&logits, 2, 1)));
        assert_eq!(sampler.take_logprobs(), None, "told once");
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        let base = SamplerOptions::default();
        let name = |options, extras| Sampler::with(options, extras).unwrap_err().name;
        let bias = |bias: &[(u32, f32)]| Extras { bias: bias.into(), ..Extras::default() };
        assert_eq!(name(base, bias(&[(1, f32::NAN)])), "a logit bias");
        assert_eq!(name(base, bias(&[(1, 1001.0)])), "a logit bias");
        assert_eq!(name(base, bias(&[(1, 1.0); 1025])), "the number of logit biases");
        assert_eq!(name(base, Extras { logprobs: Some(21), ..Extras::default() }), "logprobs");
        for value in [f32::NAN, -0.1, 1.1] {
            assert_eq!(name(SamplerOptions { min_p: value, ..base }, bias(&[])), "min-p");
        }
        for value in [f32::NAN, 101.0] {
            let presence = SamplerOptions { presence_penalty: value, ..base };
            assert_eq!(name(presence, bias(&[])), "presence penalty");
            let frequency = SamplerOptions { frequency_penalty: value, ..base };
            assert_eq!(name(frequency, bias(&[])), "frequency penalty");
        }
    }

    #[test]
    fn only_what_a_device_cannot_do_is_left_to_the_host() {
        let base = SamplerOptions::default();
        let plain = |options| Sampler::new(options).unwrap().is_plain();
        assert!(plain(base) && plain(SamplerOptions { repetition_penalty: 1.2, ..base }));
        assert!(plain(SamplerOptions { temperature: 0.7, top_k: 9, top_p: 0.9, ..base }));
        assert!(plain(SamplerOptions { min_p: 0.1, ..base }), "greedy keeps the likeliest anyway");
        assert!(!plain(SamplerOptions { min_p: 0.1, temperature: 0.7, ..base }));
        assert!(!plain(SamplerOptions { presence_penalty: 0.1, ..base }));
        assert!(!plain(SamplerOptions { frequency_penalty: -0.1, ..base }));
        let with = |extras| Sampler::with(base, extras).unwrap().is_plain();
        assert!(!with(Extras { bias: [(0, 1.0)].into(), ..Extras::default() }));
        assert!(!with(Extras { logprobs: Some(0), ..Extras::default() }));
    }
}
