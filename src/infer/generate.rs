//! Prompt in, tokens out: prefill, then one step per token until something ends the generation.
//!
//! A [`Generation`] is driven step by step, so that several can take turns on one engine;
//! [`generate`] drives a single one.
//!
//! Knows tokens only; text is the tokenizer's business. The last generated token is not fed back,
//! so the sequence ends with the token before it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::backend::LogitRows;
use super::engine::{Engine, Next, Rows};
use super::error::SessionError;
use super::extras::{Extras, Logprobs};
use super::sampler::SamplerOptions;
use super::sequence::Sequence;

/// When to stop and how to choose.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// Tokens that end the text. They are not reported.
    pub stop: Vec<u32>,
    pub sampler: SamplerOptions,
    pub extras: Extras,
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub token: u32,
    /// If [`Extras::logprobs`] asks for them.
    pub logprobs: Option<Logprobs>,
}

/// What ended the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model chose one of the stop tokens.
    StopToken,
    /// The text has the form that it is held to, and nothing can follow.
    Complete,
    /// The text contains one of the stop texts. Only who knows the text sees this.
    StopString,
    MaxTokens,
    /// The cache is full.
    ContextFull,
    /// The callback asked for it.
    Cancelled,
}

/// The result of one generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The generated tokens, without the prompt and the stop token.
    pub tokens: Vec<u32>,
    pub reason: StopReason,
    pub prompt_tokens: usize,
    /// From the call to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    pub clamped: u64,
}

impl Generated {
    /// Decoded tokens a second. The first token comes from prefill and is not counted. 0 if there
    /// are no others.
    pub fn decode_tok_s(&self) -> f64 {
        let tokens = self.tokens.len().saturating_sub(1) as f64;
        if tokens == 0.0 { 0.0 } else { tokens / self.decode.as_secs_f64().max(1e-9) }
    }
}

/// Positions after the prompt for which room is made at the start. More room is made when needed.
pub(super) const ROOM: usize = 4096;

/// A prompt's last step has at least this many tokens if the prompt has, so that the sizes of the
/// steps before it do not decide which kernels it runs on.
const TAIL_MIN: usize = 32;

/// A generation in progress: how much of its prompt has run, and what was generated.
#[derive(Debug)]
pub struct Generation {
    prompt: Vec<u32>,
    /// Tokens of the prompt that have run.
    fed: usize,
    max_tokens: usize,
    stop: Vec<u32>,
    /// Positions that the sequence may use.
    context: usize,
    tokens: Vec<u32>,
    /// The token that was chosen and not yet taken.
    next: Option<u32>,
    clamped: u64,
    started: Instant,
    first: Option<Instant>,
}

impl Generation {
    /// Prepares a sequence for a prompt that is appended to it. Runs nothing.
    ///
    /// # Errors
    /// If the prompt is empty or does not fit, or an option is out of range.
    pub fn begin(
        engine: &Engine,
        sequence: &mut Sequence,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Self, SessionError> {
        if prompt.is_empty() {
            return Err(SessionError::EmptyPrompt);
        }
        let (position, context) = (sequence.len(), sequence.limit().min(engine.context_max()));
        if prompt.len() > context.saturating_sub(position) {
            return Err(SessionError::Full { position, context, tokens: prompt.len() });
        }
        sequence.set_sampler(options.sampler, &options.extras)?;
        Ok(Self {
            prompt: prompt.to_vec(),
            fed: 0,
            max_tokens: options.max_tokens,
            stop: options.stop.clone(),
            context,
            tokens: Vec::new(),
            next: None,
            clamped: engine.clamped(),
            started: Instant::now(),
            first: None,
        })
    }

    /// Positions that the generation will probably use.
    pub fn room(&self, sequence: &Sequence) -> usize {
        let left = self.prompt.len() - self.fed + self.max_tokens.min(ROOM);
        (sequence.len() + left).min(self.context)
    }

    /// Tokens of the prompt that have not run.
    pub const fn prompt_left(&self) -> usize {
        self.prompt.len() - self.fed
    }

    /// Runs at most `most` tokens of the prompt, and chooses the first token after its last one.
    /// Returns how many were run.
    ///
    /// # Errors
    /// If the step fails. The sequence is then where it was before the prompt.
    pub fn feed(
        &mut self,
        engine: &mut Engine,
        sequence: &mut Sequence,
        most: usize,
    ) -> Result<usize, SessionError> {
        let left = self.prompt_left();
        let most = most.clamp(1, engine.batch());
        let count = match left {
            0 => return Ok(0),
            left if left <= most => left,
            left if most >= 2 * TAIL_MIN && left - most < TAIL_MIN => left - TAIL_MIN,
            _ => most,
        };
        let last = count == left;
        sequence.expect(sequence.len() + left);
        let logits = if last { LogitRows::Last } else { LogitRows::None };
        let tokens = &self.prompt[self.fed..self.fed + count];
        let step = engine.step(&mut [Rows { sequence: &mut *sequence, tokens, logits }]);
        let step = step.inspect_err(|_| sequence.unfeed(self.fed));
        if last || step.is_err() {
            sequence.expect(0);
        }
        let logits = step?.pop().unwrap_or_default();
        self.fed += count;
        if last && self.max_tokens > 0 {
            self.next = Some(sequence.try_choose(&logits)?);
            self.first = Some(Instant::now());
        }
        Ok(count)
    }

    /// The token that was chosen, or why there is none. Call once after the whole prompt has run,
    /// and once after each [`chose`](Self::chose).
    pub fn take(&mut self, sequence: &mut Sequence) -> ControlFlow<StopReason, Chosen> {
        let Some(token) = self.next.take() else {
            return ControlFlow::Break(StopReason::MaxTokens);
        };
        if self.stop.contains(&token) {
            return ControlFlow::Break(StopReason::StopToken);
        }
        self.tokens.push(token);
        ControlFlow::Continue(Chosen { token, logprobs: sequence.take_logprobs() })
    }

    /// Why the token just taken is the last one, if it is.
    pub fn over(&self, sequence: &Sequence) -> Option<StopReason> {
        if sequence.is_complete() {
            Some(StopReason::Complete)
        } else if self.tokens.len() >= self.max_tokens {
            Some(StopReason::MaxTokens)
        } else if sequence.len() >= self.context {
            Some(StopReason::ContextFull)
        } else {
            None
        }
    }

    /// The step after the token just taken: which token runs, and how many may follow it.
    pub fn step<'a>(&self, sequence: &'a mut Sequence) -> Next<'a> {
        let token = self.tokens.last().copied().unwrap_or_default();
        Next { sequence, token, more: self.max_tokens - self.tokens.len() }
    }

    /// Takes what such a step chose.
    pub const fn chose(&mut self, token: u32) {
        self.next = Some(token);
    }

    /// Sums it up.
    pub fn end(self, engine: &Engine, reason: StopReason) -> Generated {
        let ended = Instant::now();
        let first = self.first.unwrap_or(ended);
        Generated {
            tokens: self.tokens,
            reason,
            prompt_tokens: self.prompt.len(),
            prefill: first - self.started,
            decode: ended - first,
            clamped: engine.clamped() - self.clamped,
        }
    }
}

/// Appends `prompt` to the sequence and generates what follows it. Calls `on_token` for each token
/// as it is chosen, with the engine (for its counters).
pub fn generate(
    engine: &mut Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(&Engine, &Chosen) -> ControlFlow<()>,
) -> Result<Generated, SessionError> {
    let mut generation = Generation::begin(engine, sequence, prompt, options)?;
    engine.reserve(sequence, generation.room(sequence))?;
    while generation.prompt_left() > 0 {
        generation.feed(engine, sequence, engine.batch())?;
    }
    let reason = loop {
        let chosen = match generation.take(sequence) {
            ControlFlow::Break(reason) => break reason,
            ControlFlow::Continue(chosen) => chosen,
        };
        if on_token(engine, &chosen).is_break() {
            break StopReason::Cancelled;
        }
        if let Some(reason) = generation.over(sequence) {
            break reason;
        }
        let Next { sequence, token, more } = generation.step(sequence);
        generation.chose(engine.next(sequence, token, more)?);
    };
    Ok(generation.end(engine, reason))
}
