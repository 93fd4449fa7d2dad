//! Answers held to a form: a JSON schema, a regular expression or a grammar (llguidance).
//!
//! A [`Constraint`] is what is asked for, a [`Grammar`] is that compiled for one tokenizer, and [`Held`]
//! follows one text and says which tokens may come next. The sampler takes the likelihood of all others
//! away, so whatever the model is, its text has the form; a text that is cut off is a beginning of one.
//!
//! Schemas and grammars come from strangers. Their size, depth, compilation and parser are bounded, and
//! a refused one says where and why. Compiled grammars are kept by the tokenizer, [`KEPT_MAX`] at most.

mod compile;
mod place;
mod vocabulary;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use compile::Grammars;
pub use compile::{COMPILE_STATES_MAX, CONSTRAINT_BYTES_MAX, DEPTH_MAX, KEPT_MAX, rule};

/// What a text must look like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// JSON that fits this schema.
    JsonSchema(Value),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// A text of this grammar, in llguidance's form of Lark.
    Lark(String),
}

impl Constraint {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(serde_json::json!({ "type": "object" }))
    }

    /// What it is called in a message.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "the JSON schema",
            Self::Regex(_) => "the regular expression",
            Self::Lark(_) => "the grammar",
        }
    }
}

/// Why an answer cannot be held to a form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("{what} is {bytes} bytes long, more than {CONSTRAINT_BYTES_MAX}")]
    Long { what: &'static str, bytes: usize },
    #[error("{what} is nested more than {DEPTH_MAX} levels deep")]
    Deep { what: &'static str },
    /// `place` is empty, or says where (with a space before it).
    #[error("{what} is refused{place}: {why}")]
    Refused { what: &'static str, place: String, why: String },
    #[error(
        "this model's answers cannot be held to a form: its tokenizer's decoder ({0}) is not known to \
         give each token bytes of its own"
    )]
    Decoder(String),
    #[error("this model's answers cannot be held to a form: its vocabulary has {0} tokens")]
    Vocabulary(usize),
    #[error("compiling {0} failed")]
    Failed(&'static str),
}

/// A constraint compiled for a tokenizer, and the tokens that end a text.
#[derive(Clone)]
pub struct Grammar {
    /// As it is before the first token.
    fresh: Arc<Mutex<Matcher>>,
    /// The vocabulary's size; the token of this number stands for the end.
    count: usize,
    ends: Arc<[u32]>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fresh, &other.fresh) && self.ends == other.ends
    }
}

/// How far a text that is held to a form has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Something may follow.
    Open,
    /// Nothing can follow.
    Complete,
    /// Its next tokens cannot be told, and why.
    Failed(String),
}

/// A text that is held to a form.
#[derive(Clone)]
pub(crate) struct Held {
    grammar: Grammar,
    /// Made at the first token: most samplers are only checked.
    matcher: Option<Matcher>,
    /// Tokens so far.
    taken: usize,
    /// Whether the last of them is one that ends the text. The matcher does not know of it.
    ended: bool,
    failed: Option<String>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("taken", &self.taken).finish_non_exhaustive()
    }
}

impl Held {
    pub const fn new(grammar: Grammar) -> Self {
        Self { grammar, matcher: None, taken: 0, ended: false, failed: None }
    }

    /// Does something with the matcher, and remembers a failure.
    fn with<T, E: std::fmt::Display>(
        &mut self,
        act: impl FnOnce(&mut Matcher) -> Result<T, E>,
    ) -> Option<T> {
        if self.failed.is_some() {
            return None;
        }
        let fresh = &self.grammar.fresh;
        let matcher = self.matcher.get_or_insert_with(|| {
            // A text of its own: what one adds to the parser's tables, others neither see nor keep.
            fresh.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
        });
        match act(matcher) {
            Ok(done) => Some(done),
            Err(error) => {
                let why = compile::one_line(&error.to_string());
                self.failed = Some(match why.contains("NoExtension") {
                    // Only a vocabulary that lacks bytes leads there.
                    true => "no token of this model's vocabulary fits next".to_owned(),
                    false => why,
                });
                None
            }
        }
    }

    /// Takes the likelihood of every token away that cannot come next. Leaves the logits as they are
    /// if that cannot be told; [`Self::progress`] then says why.
    pub fn mask(&mut self, logits: &mut [f32]) {
        let Some(mut mask) = self.with(Matcher::compute_mask_or_eos) else { return };
        let end = vocabulary::end(self.grammar.count);
        let may_end = mask.is_allowed(end);
        mask.disallow_token(end);
        let ends = self.grammar.ends.iter().map(|token| *token as usize);
        let ends: Vec<(usize, f32)> =
            ends.filter_map(|token| Some((token, *logits.get(token)?))).collect();
        let words = mask.as_slice();
        for (at, chunk) in logits.chunks_mut(32).enumerate() {
            let allowed = words.get(at).copied().unwrap_or(0);
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if allowed >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        for (token, logit) in ends {
            logits[token] = if may_end { logit } else { f32::NEG_INFINITY };
        }
    }

    /// Takes the token that was chosen.
    pub fn take(&mut self, token: u32) {
        self.taken += 1;
        self.ended = self.grammar.ends.contains(&token);
        if !self.ended {
            self.with(|matcher| matcher.consume_token(token));
        }
    }

    /// Goes back to the first `count` tokens.
    pub fn rewind(&mut self, count: usize) {
        let back = self.taken.saturating_sub(count);
        if back == 0 {
            return;
        }
        let back = back - usize::from(std::mem::take(&mut self.ended));
        self.taken = count;
        match count {
            // What failed is forgotten, too.
            0 => (self.matcher, self.failed) = (None, None),
            _ if back > 0 => _ = self.with(|matcher| matcher.rollback(back)),
            _ => {}
        }
    }

    pub fn progress(&self) -> Progress {
        match (&self.failed, &self.matcher) {
            (Some(why), _) => Progress::Failed(why.clone()),
            (None, Some(matcher)) if self.ended || matcher.is_stopped() => Progress::Complete,
            _ => Progress::Open,
        }
    }
}
