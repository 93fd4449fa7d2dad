//! Prompt in, tokens out: prefill, then one step per token until something ends the generation.
//!
//! Knows tokens only; text is the tokenizer's business. The last generated token is not fed back,
//! so the sequence ends with the token before it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::engine::Engine;
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

/// Appends `prompt` to the sequence and generates what follows it. Calls `on_token` for each token
/// as it is chosen, with the engine (for its counters).
pub fn generate(
    engine: &mut Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(&Engine, &Chosen) -> ControlFlow<()>,
) -> Result<Generated, SessionError> {
    if prompt.is_empty() {
        return Err(SessionError::EmptyPrompt);
    }
    let (position, context) = (sequence.len(), sequence.limit().min(engine.context_max()));
    if prompt.len() > context.saturating_sub(position) {
        return Err(SessionError::Full { position, context, tokens: prompt.len() });
    }
    sequence.set_sampler(options.sampler, &options.extras)?;
    let room = position + prompt.len() + options.max_tokens.min(ROOM);
    engine.reserve(sequence, room.min(context))?;
    let clamped = engine.clamped();
    let started = Instant::now();
    let mut tokens = Vec::new();
    let mut first = None;
    let logits = engine.prefill(sequence, prompt)?;
    let mut next = None;
    let reason = loop {
        if tokens.len() >= options.max_tokens {
            break StopReason::MaxTokens;
        }
        let token = match next {
            Some(token) => token,
            None => sequence.choose(&logits),
        };
        first.get_or_insert_with(Instant::now);
        if options.stop.contains(&token) {
            break StopReason::StopToken;
        }
        tokens.push(token);
        let chosen = Chosen { token, logprobs: sequence.take_logprobs() };
        if on_token(engine, &chosen).is_break() {
            break StopReason::Cancelled;
        }
        if tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        if sequence.len() == context {
            break StopReason::ContextFull;
        }
        next = Some(engine.next(sequence, token, options.max_tokens - tokens.len())?);
    };
    let ended = Instant::now();
    let first = first.unwrap_or(ended);
    Ok(Generated {
        tokens,
        reason,
        prompt_tokens: prompt.len(),
        prefill: first - started,
        decode: ended - first,
        clamped: engine.clamped() - clamped,
    })
}
