//! Tokens for measurements: fixed ids, so that any model can be measured even without a tokenizer,
//! or passages of a text, which are routed as real text is.

use anyhow::{Context, ensure};

use crate::args::PromptArgs;
use crate::source::Opened;

/// The source of tokens.
pub enum Prompts {
    Ids { vocab: usize },
    Text(Vec<u32>),
}

impl Prompts {
    /// # Errors
    /// If a number is 0, or the text cannot be read or has fewer than `tokens` tokens, which one
    /// passage needs.
    pub fn open(args: &PromptArgs, opened: &Opened, tokens: usize) -> anyhow::Result<Self> {
        ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
        ensure!((1..=1000).contains(&args.prompts), "--prompts must be 1 to 1000");
        let Some(path) = &args.text else {
            return Ok(Self::Ids { vocab: opened.model.graph.vocab });
        };
        let text =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8(text)
            .with_context(|| format!("{} is not UTF-8 text", path.display()))?;
        let ids = opened.tokenizer()?.encode(&text)?;
        ensure!(
            ids.len() >= tokens,
            "{} has {} tokens, and a run takes {tokens}",
            path.display(),
            ids.len()
        );
        Ok(Self::Text(ids))
    }

    /// The `len` tokens of passage `number`. Always the same for one number, and different for
    /// another.
    pub fn passage(&self, number: usize, len: usize) -> Vec<u32> {
        match self {
            Self::Ids { vocab } => {
                let first = number.wrapping_mul(104_729) + 11;
                (0..len).map(|i| ((i * 7919 + first) % vocab) as u32).collect()
            }
            Self::Text(ids) => {
                // Multiples of the golden ratio, modulo 1, spread evenly however many there are.
                let share = (number as f64 * 0.618_033_988_749_895).fract();
                let start = (share * (ids.len() - len) as f64) as usize;
                ids[start..start + len].to_vec()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_differ_repeat_and_stay_within_what_there_is() {
        let ids: Vec<u32> = (0..5000).collect();
        for (prompts, end) in [(Prompts::Ids { vocab: 4096 }, 4096), (Prompts::Text(ids), 5000)] {
            let passages: Vec<_> = (0..7).map(|number| prompts.passage(number, 40)).collect();
            for (number, passage) in passages.iter().enumerate() {
                assert_eq!(passage.len(), 40);
                assert!(passage.iter().all(|id| *id < end));
                assert_eq!(*passage, prompts.passage(number, 40));
                assert_eq!(passages.iter().filter(|other| *other == passage).count(), 1);
            }
        }
    }
}
