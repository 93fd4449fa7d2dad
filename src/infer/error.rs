//! Why a session could not be made or a step could not be run: one error for the session, its pager
//! and its slots.

use super::adapter::AdapterError;
use super::backend::BackendError;
use super::model::NotFinite;
use super::sampler::SamplerError;
use doppler_store::ReadError;

/// Why a session could not be made or a step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(
        "{given} are less than one token needs: \
         the smallest budget that works is {smallest_bytes}B ({smallest_slots} slots)"
    )]
    BudgetTooSmall { given: String, smallest_bytes: u64, smallest_slots: usize },
    #[error(
        "no room for {positions} positions: keys and values take {bytes} bytes more than \
         the budget of {budget} bytes leaves"
    )]
    Room { positions: usize, bytes: u64, budget: u64 },
    #[error(
        "no room for another sequence: its recurrent states take {bytes} bytes, more than the \
         budget of {budget} bytes leaves"
    )]
    States { bytes: u64, budget: u64 },
    #[error("a context of {context} tokens is out of range: this model was made for 1..={max}")]
    Context { context: usize, max: usize },
    #[error("the context is full: {position} of {context} positions used, {tokens} more asked for")]
    Full { position: usize, context: usize, tokens: usize },
    #[error("a step of {tokens} tokens is out of range: this session takes 1..={batch}")]
    Batch { tokens: usize, batch: usize },
    #[error("the sequence belongs to another loaded model")]
    Foreign,
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error("the prompt is empty: give the model something to continue")]
    EmptyPrompt,
    #[error("this is an embedding model, which makes no text: use doppler-node embed")]
    NotText,
    #[error("this model sees a text as a whole: run it in one step")]
    Whole,
    #[error("perplexity needs at least two tokens: one to predict, and one before it")]
    NothingToScore,
    #[error(
        "the prompt has {tokens} tokens, the context {context} positions: \
         shorten it, or ask for a longer context"
    )]
    Prompt { tokens: usize, context: usize },
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    #[error("the answer cannot be held to its form any longer: {0}")]
    Grammar(String),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Weight(#[from] NotFinite),
    #[error(
        "the model's output at position {position} is not finite: its weights, or the \
         activations that they lead to, are out of range"
    )]
    Output { position: usize },
    #[error("the perplexity is not finite after {tokens} tokens: {nats} nats a token")]
    Perplexity { tokens: usize, nats: f64 },
}

impl SessionError {
    /// A stable name for JSON and metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Backend(error) => error.label(),
            Self::Read(error) => error.label(),
            Self::Adapter(error) => error.label(),
            Self::BudgetTooSmall { .. } | Self::Room { .. } | Self::States { .. } => "budget",
            Self::Context { .. } => "context",
            Self::Full { .. } => "context_full",
            Self::Batch { .. } => "batch",
            Self::Foreign => "foreign_sequence",
            Self::Token { .. } => "token",
            Self::EmptyPrompt => "empty_prompt",
            Self::NotText => "not_text",
            Self::Whole => "whole",
            Self::NothingToScore => "nothing_to_score",
            Self::Prompt { .. } => "prompt_too_long",
            Self::Sampler(_) => "sampling",
            Self::Grammar(_) => "grammar",
            Self::Weight(_) | Self::Output { .. } | Self::Perplexity { .. } => "not_finite",
        }
    }
}
