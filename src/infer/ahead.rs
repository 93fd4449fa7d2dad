//! Reading ahead: experts that the next layer will probably choose, read while this one is computed.
//!
//! The guess is what the next layer's router says of this layer's state. Results never depend on
//! it: a wrong guess is cancelled once the choice is known, and a right one whose read failed is
//! read again. Every guess is scored. While fewer than [`SCORE_MIN`] of recent guesses were right,
//! nothing is read ahead, because a wrong one costs bandwidth, memory and processor time.
//!
//! Invariant: at most [`AHEAD_BYTES_MAX`] are in flight or waiting to be used.

use super::graph::MoeId;
use super::model::MoeLayer;
use super::reader::{Reading, WeightReader};
use doppler_store::Priority;

/// More than the experts that one token chooses in two layers of most models.
const AHEAD_BYTES_MAX: usize = 384 << 20;

/// The share of recent guesses that must have been right before the next ones are read.
const SCORE_MIN: f32 = 0.5;

/// How much of the old score is kept when the next layer's guesses are counted.
const FADING: f32 = 0.98;

/// Guessed experts that nobody has asked for yet, and their reads.
#[derive(Default)]
pub struct Ahead {
    layers: Vec<Guess>,
    /// Bytes in flight or waiting to be used.
    bytes: usize,
    /// Experts guessed, and how many of them were asked for; both decay by [`FADING`].
    guesses: f32,
    right: f32,
}

/// The guesses for one layer.
struct Guess {
    moe: MoeId,
    expert_bytes: usize,
    /// By expert: its read, or `None` if the guess is only scored.
    experts: Vec<(u32, Option<Reading>)>,
}

impl Ahead {
    /// Call when a step begins. Cancels what was read ahead for another step.
    pub fn clear(&mut self) {
        self.layers.clear();
        self.bytes = 0;
    }

    /// Adds these experts of one layer, likeliest first, to its guesses, and starts to read them if
    /// guesses have been good enough. Returns how many reads were started.
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

    /// The reads that were started for experts in `wanted`. The layer's other reads are cancelled.
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
        assert_eq!(round(&[1, 5]), (2, 1), "half of them right: keep reading");
        assert_eq!(round(&[3, 1]), (2, 2));
        assert_eq!((round(&[]), round(&[])), ((2, 0), (0, 0)), "reading ahead has stopped");
        let again = (0..20).position(|_| round(&[1, 3]).0 > 0);
        assert!(again.is_some_and(|rounds| rounds > 0), "guesses are still scored: {again:?}");
        let begun = ahead.begin(MoeId(0), layer, [2].into_iter(), &model.reader);
        assert_eq!(begun, 1);
        assert_eq!(
            ahead.begin(MoeId(0), layer, [2, 4].into_iter(), &model.reader),
            1,
            "2 is in flight"
        );
        assert_eq!(ahead.begin(MoeId(1), &model.moe[1], [7].into_iter(), &model.reader), 1);
        assert_eq!(ahead.take(MoeId(1), |_| true).len(), 1);
        assert_eq!(ahead.take(MoeId(0), |expert| expert != 4).len(), 1);
        assert!(ahead.take(MoeId(0), |_| true).is_empty(), "taken");
        ahead.begin(MoeId(0), layer, [2].into_iter(), &model.reader);
        ahead.clear();
        assert!(ahead.take(MoeId(0), |_| true).is_empty(), "cancelled");
        assert_eq!(ahead.bytes, 0);
    }
}
