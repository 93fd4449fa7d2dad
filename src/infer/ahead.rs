//! Reading ahead: experts that a layer will probably choose, read while the layer's attention is computed.
//!
//! The guess is the layer's own router, asked before its attention. What is computed never depends on it: a wrong one
//! is given up once the choice is known, a right one whose read failed is read again. Every guess is scored, and
//! nothing is read while fewer than [`SCORE_MIN`] of those of late were right: a wrong one costs a link, memory and the processor.
//!
//! Invariant: at most one layer is read ahead, [`AHEAD_BYTES_MAX`] of it.

use super::graph::MoeId;
use super::model::MoeLayer;
use super::reader::{Reading, WeightReader};
use crate::store::Priority;

/// Bytes read ahead at a time: more than a token chooses in a layer of most models.
const AHEAD_BYTES_MAX: usize = 384 << 20;

/// The share of guesses that must have been right for the next to be read. Trained models give 0.58 to 0.62 with half of their
/// experts in slots.
const SCORE_MIN: f32 = 0.5;

/// What a layer's guesses weigh in the score when the next layer's are counted.
const FADING: f32 = 0.98;

/// Experts of one layer that nobody asked for yet, and the reads of them.
#[derive(Default)]
pub struct Ahead {
    moe: Option<MoeId>,
    guessed: Vec<u32>,
    reads: Vec<(u32, Reading)>,
    /// Experts guessed and those of them that were asked for, both fading.
    guesses: f32,
    right: f32,
}

impl Ahead {
    /// Guesses these experts of one layer, likeliest first, and begins to read them if guesses are worth it.
    /// What else was read ahead is given up. Returns how many are under way.
    pub fn begin(
        &mut self,
        moe: MoeId,
        layer: &MoeLayer,
        experts: impl Iterator<Item = u32>,
        reader: &WeightReader,
    ) -> usize {
        self.reads.clear();
        self.moe = Some(moe);
        self.guessed.clear();
        self.guessed.extend(experts);
        if self.right >= SCORE_MIN * self.guesses {
            let most = AHEAD_BYTES_MAX / layer.layout.bytes.max(1);
            let read = |expert: &u32| {
                (*expert, reader.begin(&layer.places[*expert as usize], Priority::Prefetch))
            };
            self.reads.extend(self.guessed.iter().take(most).map(read));
        }
        self.reads.len()
    }

    /// The reads of those experts of `wanted` that were begun; the others are given up.
    pub fn take(&mut self, moe: MoeId, wanted: impl Fn(u32) -> bool) -> Vec<(u32, Reading)> {
        let mut reads = std::mem::take(&mut self.reads);
        if self.moe.take() != Some(moe) {
            return Vec::new();
        }
        let right = self.guessed.iter().filter(|expert| wanted(**expert)).count();
        self.guesses = self.guesses * FADING + self.guessed.len() as f32;
        self.right = self.right * FADING + right as f32;
        reads.retain(|(expert, _)| wanted(*expert));
        reads
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing;
    use super::*;
    use crate::store::DType;

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
        assert!(ahead.take(MoeId(1), |_| true).is_empty(), "another layer's");
        assert!(ahead.take(MoeId(0), |_| true).is_empty(), "given up");
    }
}
