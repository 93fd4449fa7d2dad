//! Reading ahead: experts that the next layer will probably choose, read while this one is computed.
//!
//! The guess is the next layer's router, asked with this layer's state. What is computed never depends on it: a wrong one
//! is given up once the choice is known, a right one whose read failed is read again. Every guess is scored, and
//! nothing is read while fewer than [`SCORE_MIN`] of those of late were right: a wrong one costs a link, memory and the processor.
//!
//! Invariant: at most [`AHEAD_BYTES_MAX`] are under way or waiting.

use super::graph::MoeId;
use super::model::MoeLayer;
use super::reader::{Reading, WeightReader};
use doppler_store::Priority;

/// More than a token chooses in two layers of most models.
const AHEAD_BYTES_MAX: usize = 384 << 20;

/// The share of guesses that must have been right for the next to be read.
const SCORE_MIN: f32 = 0.5;

/// What a layer's guesses weigh in the score when the next layer's are counted.
const FADING: f32 = 0.98;

/// Experts that nobody asked for yet, and the reads of them.
#[derive(Default)]
pub struct Ahead {
    layers: Vec<Guess>,
    /// Bytes under way or waiting.
    bytes: usize,
    /// Experts guessed and those of them that were asked for, both fading.
    guesses: f32,
    right: f32,
}

/// One layer's.
struct Guess {
    moe: MoeId,
    expert_bytes: usize,
    /// Those that are read, and those that are only scored.
    experts: Vec<(u32, Option<Reading>)>,
}

impl Ahead {
    /// A step begins: what was read ahead for another is given up.
    pub fn clear(&mut self) {
        self.layers.clear();
        self.bytes = 0;
    }

    /// Guesses these experts of one layer, likeliest first, beside those guessed of it before, and begins to read them if guesses
    /// are worth it. Returns how many reads were begun.
    pub fn begin(
        &mut self,
        moe: MoeId,
        layer: &MoeLayer,
        experts: impl Iterator<Item = u32>,
        reader: &WeightReader,
    ) -> usize {
        let expert_bytes = layer.layout.bytes;
        let at = self.layers.iter().position(|guess| guess.moe == moe).unwrap_or_else(|| {
            self.layers.push(Guess { moe, expert_bytes, experts: Vec::new() });
            self.layers.len() - 1
        });
        let worth = self.right >= SCORE_MIN * self.guesses;
        let mut begun = 0;
        for expert in experts {
            let guess = &mut self.layers[at];
            if guess.experts.iter().any(|(other, _)| *other == expert) {
                continue;
            }
            let reading = (worth && self.bytes + expert_bytes <= AHEAD_BYTES_MAX).then(|| {
                self.bytes += expert_bytes;
                begun += 1;
                reader.begin(&layer.places[expert as usize], Priority::Prefetch)
            });
            guess.experts.push((expert, reading));
        }
        begun
    }

    /// The reads of those experts of `wanted` that were begun; the layer's others are given up.
    pub fn take(&mut self, moe: MoeId, wanted: impl Fn(u32) -> bool) -> Vec<(u32, Reading)> {
        let Some(at) = self.layers.iter().position(|guess| guess.moe == moe) else {
            return Vec::new();
        };
        let Guess { experts, expert_bytes, .. } = self.layers.swap_remove(at);
        let right = experts.iter().filter(|(expert, _)| wanted(*expert)).count();
        self.guesses = self.guesses * FADING + experts.len() as f32;
        self.right = self.right * FADING + right as f32;
        let reads = experts.into_iter().filter_map(|(expert, reading)| Some((expert, reading?)));
        let reads: Vec<_> = reads.inspect(|_| self.bytes -= expert_bytes).collect();
        reads.into_iter().filter(|(expert, _)| wanted(*expert)).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing;
    use super::*;
    use doppler_store::DType;

    #[test]
    fn experts_are_read_only_while_guesses_are_worth_it() {
        let config = json!({
            "architectures": ["MixtralForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 16, "max_position_embeddings": 16, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        });
        let model = testing::random(&config, 1, |_| DType::F32);
        let (mut ahead, layer) = (Ahead::default(), &model.moe[0]);
        let mut round = |right: &[u32]| {
            let begun = ahead.begin(MoeId(0), layer, [3, 1].into_iter(), &model.reader);
            let used = ahead.take(MoeId(0), |expert| right.contains(&expert));
            assert!(used.iter().all(|(expert, _)| right.contains(expert)));
            (begun, used.len())
        };
        assert_eq!(round(&[1, 5]), (2, 1), "half of them right: go on");
        assert_eq!(round(&[3, 1]), (2, 2));
        assert_eq!((round(&[]), round(&[])), ((2, 0), (0, 0)), "nothing is read any more");
        let again = (0..20).position(|_| round(&[1, 3]).0 > 0);
        assert!(again.is_some_and(|rounds| rounds > 0), "but guesses are still scored: {again:?}");
        let begun = ahead.begin(MoeId(0), layer, [2].into_iter(), &model.reader);
        assert_eq!(begun, 1);
        assert_eq!(
            ahead.begin(MoeId(0), layer, [2, 4].into_iter(), &model.reader),
            1,
            "2 is under way"
        );
        assert_eq!(ahead.begin(MoeId(1), &model.moe[1], [7].into_iter(), &model.reader), 1);
        assert_eq!(ahead.take(MoeId(1), |_| true).len(), 1);
        assert_eq!(ahead.take(MoeId(0), |expert| expert != 4).len(), 1);
        assert!(ahead.take(MoeId(0), |_| true).is_empty(), "taken");
        ahead.begin(MoeId(0), layer, [2].into_iter(), &model.reader);
        ahead.clear();
        assert!(ahead.take(MoeId(0), |_| true).is_empty(), "given up");
        assert_eq!(ahead.bytes, 0);
    }
}
