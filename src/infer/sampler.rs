//! From logits to the next token: greedy, or drawn after biases, penalties, temperature, top-k,
//! top-p and min-p, in that order.
//!
//! Deterministic: the same options, logits and history give the same token on every machine and
//! device, because probabilities are integers (`odds`). Nothing is sorted; thresholds come from
//! histograms. A NaN logit is never chosen while any other logit is a number. A session refuses
//! such a row before it gets here.

use super::cpu::sample_cut::{Part, sample_cut};
use super::cpu::sample_draw::sample_draw;
use super::cpu::sample_greedy::sample_greedy;
use super::cpu::sample_keys::sample_keys;
use super::cpu::sample_ranks::{Bins, sample_ranks};
use super::cpu::sample_top_k::sample_top_k;
use super::cpu::sample_top_p::sample_top_p;
use super::extras::{Extras, Logprobs, PENALTY_MAX};
use super::grammar::{Held, Progress};
use super::odds::{NEVER, Recipe, key, random, weight};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// Divides logits; 0 means greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest; 0 means all.
    pub top_k: usize,
    /// Keep the likeliest whose probabilities reach `top_p` together; 1 means all.
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest; 0 means all.
    pub min_p: f32,
    /// Logits of recent tokens are divided by it if positive and multiplied by it if negative
    /// (Keskar et al., 2019). 1 means no penalty.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of recent tokens, once.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a recent token for each time that it occurs.
    pub frequency_penalty: f32,
    /// How many recent tokens count as repetitions, prompt included.
    pub repetition_window: usize,
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

/// An option out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}, expected {want}")]
pub struct SamplerError {
    pub name: &'static str,
    pub value: f32,
    pub want: &'static str,
}

/// Chooses one token after another.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    extras: Extras,
    /// The text from the first choice on, if it is held to a form.
    held: Option<Held>,
    recipe: Recipe,
    /// The least weight that min-p keeps; 0 keeps all.
    weight_min: u32,
    /// The probabilities at the last choice, if they are asked for.
    told: Option<Logprobs>,
    /// The tokens accepted so far, kept for rewinding.
    accepted: Vec<u32>,
    /// How many tokens were accepted before the first choice. Draws are numbered from there by
    /// position, so a choice depends on the tokens accepted before it and not on other draws in
    /// between.
    first: Option<usize>,
    /// Draws made since the last one was accepted.
    pending: u64,
    scratch: Scratch,
}

/// Working memory for a choice. The next choice overwrites it.
#[derive(Debug, Clone, Default)]
struct Scratch {
    /// Logits with biases and penalties.
    adjusted: Vec<f32>,
    /// Keys, then ranks.
    ranks: Vec<u32>,
    bins: Bins,
    parts: Vec<Part>,
}

impl Sampler {
    pub fn new(options: SamplerOptions) -> Result<Self, SamplerError> {
        Self::with(options, Extras::default())
    }

    /// # Errors
    /// If an option is out of range.
    pub fn with(options: SamplerOptions, extras: Extras) -> Result<Self, SamplerError> {
        let check = |name, value: f32, good: bool, want| match good {
            true => Ok(()),
            false => Err(SamplerError { name, value, want }),
        };
        let SamplerOptions { temperature, top_p, min_p, repetition_penalty: penalty, .. } = options;
        let finite = temperature.is_finite() && temperature >= 0.0;
        check("temperature", temperature, finite, "0 (greedy) or more")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0 and at most 1")?;
        check("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 (keeps all) to 1")?;
        let good = penalty.is_finite() && penalty > 0.0;
        check("repetition penalty", penalty, good, "more than 0 (1 is none)")?;
        for (name, penalty) in [
            ("presence penalty", options.presence_penalty),
            ("frequency penalty", options.frequency_penalty),
        ] {
            check(name, penalty, penalty.abs() <= PENALTY_MAX, "-100 to 100 (0 is none)")?;
        }
        extras.check()?;
        let recipe = Recipe::new(&options);
        // In units of `weight`: an integer, so that the cut is the same everywhere.
        let weight_min = (f64::from(min_p) * f64::from(weight(0))) as u32;
        let weight_min = if recipe.greedy { 0 } else { weight_min };
        Ok(Self {
            options,
            held: extras.grammar.clone().map(Held::new),
            extras,
            recipe,
            weight_min,
            told: None,
            accepted: Vec::new(),
            first: None,
            pending: 0,
            scratch: Scratch::default(),
        })
    }

    /// Whether a device that samples can make this sampler's choices.
    pub fn is_plain(&self) -> bool {
        let adjusts = self.adjusts();
        !adjusts && self.weight_min == 0 && self.extras.logprobs.is_none()
    }

    /// Whether logits change in ways that kernels do not know.
    fn adjusts(&self) -> bool {
        let SamplerOptions { presence_penalty, frequency_penalty, .. } = self.options;
        self.held.is_some()
            || !self.extras.bias.is_empty()
            || presence_penalty != 0.0
            || frequency_penalty != 0.0
    }

    /// The probabilities at the last choice, if they were asked for and not yet taken.
    pub fn take_logprobs(&mut self) -> Option<Logprobs> {
        self.told.take()
    }

    /// Remembers a token of the sequence, prompt included, for the repetition penalty.
    pub fn accept(&mut self, token: u32) {
        self.pending = 0;
        self.accepted.push(token);
        if let (Some(_), Some(held)) = (self.first, &mut self.held) {
            held.take(token);
        }
    }

    /// How far the text has come, if it is held to a form.
    pub fn progress(&self) -> Option<Progress> {
        self.held.as_ref().map(Held::progress)
    }

    /// The accepted token number `index`, counted from 0.
    pub fn accepted(&self, index: usize) -> Option<u32> {
        self.accepted.get(index).copied()
    }

    /// Goes back to the state in which only the first `count` tokens were accepted.
    pub fn rewind(&mut self, count: usize) {
        self.accepted.truncate(count);
        self.pending = 0;
        if let (Some(first), Some(held)) = (self.first, &mut self.held) {
            held.rewind(self.accepted.len().saturating_sub(first));
        }
        self.first = self.first.filter(|first| *first <= self.accepted.len());
    }

    /// Remembers a token that a device chose from this sampler's state. Has the same effect as
    /// `sample` and `accept`.
    pub fn follow(&mut self, token: u32) {
        self.first.get_or_insert(self.accepted.len());
        self.accept(token);
    }

    /// Chooses the next token. `logits` has one entry for each token of the vocabulary, and at
    /// least one.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let token = self.choose(logits);
        self.told = self.extras.logprobs.map(|count| Logprobs::of(logits, token, count));
        token
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        let draws = self.draws();
        self.first.get_or_insert(self.accepted.len());
        let adjusts = self.adjusts();
        let Self { recipe, accepted, scratch, held, .. } = self;
        let Scratch { adjusted, ranks, bins, parts } = scratch;
        ranks.resize(logits.len(), 0);
        if adjusts {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            let recent = last(accepted, self.options.repetition_window);
            self.extras.adjust(adjusted, recent, &self.options, recipe);
            if let Some(held) = held {
                held.mask(adjusted);
            }
            sample_keys(adjusted, std::iter::empty(), recipe, ranks);
        } else {
            let recent = last(accepted, recipe.window).iter().copied();
            sample_keys(logits, recent, recipe, ranks);
        }
        let (best, max) = sample_greedy(ranks);
        if recipe.greedy {
            return best;
        }
        bins.clear();
        sample_ranks(ranks, max, recipe, bins);
        let k = if recipe.top_k > 0 { sample_top_k(ranks, recipe, bins) } else { None };
        let p = if recipe.top_p > 0 { sample_top_p(ranks, recipe, k, bins) } else { None };
        if self.weight_min > 0 {
            let unlikely = |rank: &&mut u32| weight(**rank) < self.weight_min;
            ranks.iter_mut().filter(unlikely).for_each(|rank| *rank = NEVER);
        }
        let cut = sample_cut(ranks, k, p, bins, parts);
        let random = random(recipe.seed, draws);
        self.pending += 1;
        sample_draw(ranks, cut, parts, random)
    }

    /// The options, as the kernels take them.
    pub const fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The number of draws made so far, which is the number of the next draw.
    pub fn draws(&self) -> u64 {
        match self.first {
            Some(first) if !self.recipe.greedy => {
                (self.accepted.len() - first) as u64 + self.pending
            }
            _ => 0,
        }
    }

    /// The tokens that count as repetitions, the oldest first.
    pub fn recent(&self) -> impl ExactSizeIterator<Item = u32> {
        last(&self.accepted, self.recipe.window).iter().copied()
    }
}

fn last(accepted: &[u32], count: usize) -> &[u32] {
    &accepted[accepted.len().saturating_sub(count)..]
}

/// The token with the highest logit; among equals, the lowest id. NaN counts as -inf.
pub fn greedy(logits: &[f32]) -> u32 {
    let max = logits.iter().map(|logit| key(*logit)).max();
    logits.iter().position(|logit| Some(key(*logit)) == max).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::odds::{NEVER, Ruler, below, enough, weight};

    fn draws(options: SamplerOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_highest_and_of_equals_the_first() {
        assert_eq!(greedy(&[1.0, 3.0, f32::NAN, 3.0]), 1);
        assert_eq!(greedy(&[f32::NAN, f32::NEG_INFINITY]), 0);
        let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
        assert_eq!(sampler.sample(&[0.0, 0.5, 0.25]), 1);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let options = SamplerOptions { temperature: 1.0, seed: 7, ..SamplerOptions::default() };
        let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln(), f32::NAN];
        let counts = draws(options, &logits, 20_000);
        assert_eq!(counts, draws(options, &logits, 20_000), "same seed, same draws");
        assert_ne!(counts, draws(SamplerOptions { seed: 8, ..options }, &logits, 20_000));
        for (count, p) in counts.iter().zip([0.5, 0.3, 0.2, 0.0]) {
            let got = *count as f64 / 20_000.0;
            assert!((got - p).abs() < 0.015, "{got} for {p}");
        }
        // Half the temperature squares the probabilities.
        let cold = draws(SamplerOptions { temperature: 0.5, ..options }, &logits, 20_000);
        assert!((cold[0] as f64 / 20_000.0 - 0.25 / 0.38).abs() < 0.015, "{cold:?}");
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let options = SamplerOptions { temperature: 1.0, ..SamplerOptions::default() };
        let logits = [0.1_f32.ln(), 0.4_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln()];
        let counts = draws(SamplerOptions { top_k: 2, ..options }, &logits, 1000);
        assert!(counts[0] == 0 && counts[3] == 0 && counts[1] > counts[2], "{counts:?}");
        let counts = draws(SamplerOptions { top_p: 0.65, ..options }, &logits, 1000);
        assert!(counts[0] == 0 && counts[3] == 0 && counts[2] > 0, "{counts:?}");
        let counts = draws(SamplerOptions { top_p: 0.01, ..options }, &logits, 100);
        assert_eq!(counts, [0, 100, 0, 0], "at least one stays");
    }

    /// The rule spelled out: sorted by rank, then token.
    fn sorted(logits: &[f32], recent: &[u32], options: &SamplerOptions, random: u64) -> u32 {
        let recipe = Recipe::new(options);
        let mut logits = logits.to_vec();
        for token in recent.iter().collect::<std::collections::HashSet<_>>() {
            logits[*token as usize] = recipe.penalised(logits[*token as usize]);
        }
        let keys: Vec<u32> = logits.iter().map(|logit| key(*logit)).collect();
        let ruler = Ruler::new(&recipe, *keys.iter().max().unwrap());
        let mut order: Vec<(u32, u32)> = keys.iter().map(|k| ruler.rank(*k)).zip(0..).collect();
        order.retain(|(rank, _)| *rank != NEVER);
        order.sort_unstable();
        if options.top_k > 0 {
            order.truncate(options.top_k);
        }
        let mass = |order: &[(u32, u32)]| -> u64 {
            order.iter().map(|(rank, _)| u64::from(weight(*rank))).sum()
        };
        if recipe.top_p > 0 {
            let enough = enough(mass(&order), recipe.top_p);
            let keep = (1..=order.len()).find(|n| mass(&order[..*n]) >= enough);
            order.truncate(keep.unwrap_or(0));
        }
        let mut left = below(random, mass(&order));
        order.sort_unstable_by_key(|(_, token)| *token);
        for (rank, token) in order {
            let here = u64::from(weight(rank));
            if left < here {
                return token;
            }
            left -= here;
        }
        0
    }

    #[test]
    fn thresholds_by_histogram_are_those_of_sorting() {
        let mut draw = 0;
        let mut any = |n: usize| {
            draw += 1;
            random(0x5eed, draw) as usize % n
        };
        for case in 0..600 {
            let vocab = [1, 2, 7, 300, 2500][any(5)];
            // Few levels make many ties.
            let levels = [1, 3, 40, 1 << 20][any(4)];
            let spread = [1e-3, 1.0, 30.0, 1e6][any(4)];
            let mut logits: Vec<f32> =
                (0..vocab).map(|_| (any(levels) as f32 / levels as f32 - 0.5) * spread).collect();
            for odd in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 1e-40] {
                if any(4) == 0 {
                    logits[any(vocab)] = odd;
                }
            }
            let options = SamplerOptions {
                temperature: [1e-3, 0.7, 1.0, 40.0][any(4)],
                top_k: [0, 2, 5, 200, 4000][any(5)],
                top_p: [1.0, 0.95, 0.4, 1e-6][any(4)],
                repetition_penalty: [1.0, 1.3, 0.6][any(3)],
                repetition_window: [1, 4, 64][any(3)],
                seed: any(1 << 30) as u64,
                ..SamplerOptions::default()
            };
            let mut sampler = Sampler::new(options).unwrap();
            for step in 0..6 {
                let recent: Vec<u32> = sampler.recent().collect();
                let want = sorted(&logits, &recent, &options, random(options.seed, step));
                assert_eq!(sampler.sample(&logits), want, "case {case}, step {step}: {options:?}");
                assert_eq!(sampler.draws(), step + 1);
                sampler.accept(want);
            }
        }
    }

    #[test]
    fn draws_from_a_large_vocabulary_follow_the_softmax() {
        // A hundred levels, each shared by many tokens: chi-squared over the levels.
        let (vocab, levels, n) = (8_000, 100, 10_000);
        let logits: Vec<f32> =
            (0..vocab).map(|i| ((i * 7919) % levels) as f32 * 0.07 - 3.0).collect();
        for temperature in [0.8, 1.7] {
            let options = SamplerOptions { temperature, seed: 11, ..SamplerOptions::default() };
            let mut want = vec![0.0; levels];
            for logit in &logits {
                let level = ((logit + 3.0) / 0.07).round() as usize;
                want[level] += f64::from(logit / temperature).exp();
            }
            let total: f64 = want.iter().sum();
            let mut got = vec![0.0; levels];
            for (token, count) in draws(options, &logits, n).into_iter().enumerate() {
                got[(token * 7919) % levels] += count as f64;
            }
            let chi: f64 = got
                .iter()
                .zip(&want)
                .map(|(got, want)| {
                    let want = want / total * n as f64;
                    (got - want).powi(2) / want
                })
                .sum();
            // 99 degrees of freedom: mean 99, standard deviation 14.
            assert!(chi < 99.0 + 4.0 * 14.0, "chi-squared of {chi} at {temperature}");
        }
    }

    #[test]
    fn what_is_not_to_be_chosen_is_not() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let options = SamplerOptions { temperature: 2.0, ..SamplerOptions::default() };
        assert_eq!(draws(options, &[nan, -inf, -1e30, nan], 50), [0, 0, 50, 0]);
        assert_eq!(draws(options, &[nan, -inf, nan], 50), [50, 0, 0], "nothing to choose");
        let both = draws(options, &[3e38, inf, nan, inf], 50);
        assert!(both[1] > 0 && both[3] > 0 && both[1] + both[3] == 50, "{both:?}");
        // One token left is the highest, however little it is ahead.
        let first = SamplerOptions { temperature: 1e3, top_k: 1, ..options };
        assert_eq!(draws(first, &[1.0, 1.000_001, 1.0], 50), [0, 50, 0]);
    }

    #[test]
    fn following_a_device_leaves_what_sampling_leaves() {
        let options = SamplerOptions {
            temperature: 1.0,
            repetition_penalty: 1.5,
            repetition_window: 3,
            seed: 5,
            ..SamplerOptions::default()
        };
        let logits = [0.3, 0.1, 0.2, 0.4, 0.0];
        let mut here = Sampler::new(options).unwrap();
        let mut there = here.clone();
        for step in 0..40 {
            let token = here.sample(&logits);
            here.accept(token);
            if step % 2 == 0 {
                assert_eq!(there.sample(&logits), token);
                there.accept(token);
            } else {
                there.follow(token);
            }
        }
    }

    #[test]
    fn recent_tokens_are_penalised_until_they_leave_the_window() {
        let options = SamplerOptions {
            repetition_penalty: 2.0,
            repetition_window: 2,
            ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        let logits = [1.0, 0.9, 0.8, -0.1];
        sampler.accept(0);
        assert_eq!(sampler.sample(&logits), 1);
        sampler.accept(1);
        assert_eq!(sampler.sample(&logits), 2);
        sampler.accept(2);
        assert_eq!(sampler.sample(&logits), 0, "0 has left the window");
    }

    #[test]
    fn going_back_is_never_having_gone() {
        let options = SamplerOptions {
            temperature: 1.0,
            repetition_penalty: 1.5,
            repetition_window: 3,
            seed: 9,
            ..SamplerOptions::default()
        };
        let logits = [0.3, 0.1, 0.2, 0.4, 0.0];
        let mut sampler = Sampler::new(options).unwrap();
        sampler.accept(4);
        let next = |sampler: &mut Sampler| {
            let token = sampler.sample(&logits);
            sampler.accept(token);
            token
        };
        let tokens: Vec<u32> = (0..12).map(|_| next(&mut sampler)).collect();
        for keep in [12, 7, 1, 0] {
            sampler.rewind(1 + keep);
            let draws = sampler.draws();
            assert_eq!(draws, keep as u64, "the prompt was not drawn");
            let again: Vec<u32> = (keep..12).map(|_| next(&mut sampler)).collect();
            assert_eq!(again, tokens[keep..]);
        }
        // A draw that was not accepted does not count, either.
        sampler.sample(&logits);
        sampler.rewind(13);
        assert_eq!(sampler.draws(), 12);
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        let base = SamplerOptions::default();
        for (options, name) in [
            (SamplerOptions { temperature: -1.0, ..base }, "temperature"),
            (SamplerOptions { temperature: f32::NAN, ..base }, "temperature"),
            (SamplerOptions { top_p: 0.0, ..base }, "top-p"),
            (SamplerOptions { top_p: 1.5, ..base }, "top-p"),
            (SamplerOptions { repetition_penalty: 0.0, ..base }, "repetition penalty"),
        ] {
            assert_eq!(Sampler::new(options).unwrap_err().name, name);
        }
    }
}
