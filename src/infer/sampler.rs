//! From logits to the next token: greedy, or drawn after repetition penalty,
//! temperature, top-k and top-p, in that order.
//!
//! Deterministic: the same options, logits and history give the same token on
//! every machine with the same floating point. A logit that is not a number is never chosen
//! while another one is.

use std::cmp::Ordering;
use std::collections::{HashSet, VecDeque};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// Divides logits; 0 means greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest; 0 means all.
    pub top_k: usize,
    /// Keep the likeliest whose probabilities reach `top_p` together; 1 means all.
    pub top_p: f32,
    /// Logits of recent tokens are divided by it where positive, multiplied where
    /// negative (Keskar et al., 2019); 1 means none.
    pub repetition_penalty: f32,
    /// How many recent tokens count as repetitions.
    pub repetition_window: usize,
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
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
    rng: Rng,
    recent: VecDeque<u32>,
}

impl Sampler {
    pub fn new(options: SamplerOptions) -> Result<Self, SamplerError> {
        let check = |name, value: f32, good: bool, want| match good {
            true => Ok(()),
            false => Err(SamplerError { name, value, want }),
        };
        let SamplerOptions { temperature, top_p, repetition_penalty: penalty, .. } = options;
        let finite = temperature.is_finite() && temperature >= 0.0;
        check("temperature", temperature, finite, "0 (greedy) or more")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0 and at most 1")?;
        let good = penalty.is_finite() && penalty > 0.0;
        check("repetition penalty", penalty, good, "more than 0 (1 is none)")?;
        Ok(Self { rng: Rng::new(options.seed), options, recent: VecDeque::new() })
    }

    /// Remembers a token of the sequence, prompt included, for the repetition penalty.
    pub fn accept(&mut self, token: u32) {
        if self.options.repetition_penalty == 1.0 || self.options.repetition_window == 0 {
            return;
        }
        if self.recent.len() == self.options.repetition_window {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// The next token; `logits` has one entry a token of the vocabulary, at least one.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let mut logits = logits.to_vec();
        let penalty = self.options.repetition_penalty;
        for token in self.recent.iter().copied().collect::<HashSet<u32>>() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        if self.options.temperature == 0.0 {
            return greedy(&logits);
        }
        let candidates = self.candidates(&logits);
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut left = self.rng.unit() * total;
        for (token, p) in &candidates {
            left -= p;
            if left < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or_else(|| greedy(&logits), |(token, _)| *token)
    }

    /// Tokens that may be drawn, likeliest first, with their relative probabilities.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|i| !logits[*i as usize].is_nan()).collect();
        let better = |a: &u32, b: &u32| falling(logits, *a, *b);
        let k = self.options.top_k;
        if k > 0 && k < order.len() {
            order.select_nth_unstable_by(k, better);
            order.truncate(k);
        }
        order.sort_unstable_by(better);
        let Some(best) = order.first() else { return Vec::new() };
        let (max, temperature) = (logits[*best as usize], self.options.temperature);
        let weigh = |id: u32| f64::from((logits[id as usize] - max) / temperature).exp();
        let mut candidates: Vec<(u32, f64)> = order.iter().map(|id| (*id, weigh(*id))).collect();
        if self.options.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|(_, p)| p).sum();
            let enough = total * f64::from(self.options.top_p);
            let mut sum = 0.0;
            let keep = candidates.iter().position(|(_, p)| {
                sum += p;
                sum >= enough
            });
            candidates.truncate(keep.map_or(candidates.len(), |last| last + 1));
        }
        candidates
    }
}

/// The token with the highest logit; of equals the lowest.
pub fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len() as u32).min_by(|a, b| falling(logits, *a, *b)).unwrap_or(0)
}

/// By falling logit, then rising token; what is not a number comes last.
fn falling(logits: &[f32], a: u32, b: u32) -> Ordering {
    let key = |id: u32| {
        let logit = logits[id as usize];
        if logit.is_nan() { f32::NEG_INFINITY } else { logit }
    };
    key(b).total_cmp(&key(a)).then(a.cmp(&b))
}

/// SplitMix64 (Steele, Lea and Flood, 2014): draw `n` is a hash of `seed + n * step`.
#[derive(Debug, Clone)]
struct Rng {
    state: u64,
}

impl Rng {
    const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..1`, of 53 random bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
