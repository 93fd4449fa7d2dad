//! Connects text and the engine's tokens: opens devices by name, takes prompts, and produces text.

use std::ops::{ControlFlow, Deref};

use super::api::TokenOdds;
use super::args::BackendChoice;
use super::config;
use super::engine::{Asked, EngineError};
use doppler_infer::backend::{BackendError, Device};
use doppler_infer::cpu::CpuDevice;
use doppler_infer::engine::Engine;
use doppler_infer::error::SessionError;
use doppler_infer::extras::{Logprob, Logprobs};
use doppler_infer::generate::{Chosen, Generated, StopReason};
use doppler_infer::gpu::{AdapterChoice, GpuDevice};
use doppler_infer::model::Model;
use doppler_infer::request::Request;
use doppler_infer::sequence::Sequence;
use doppler_infer::stops::Watch;
use doppler_infer::tokenizer::{TextStream, Tokenizer, TokenizerError};

/// Opens the chosen device. `Auto` never picks a software GPU, because the CPU backend is ten times
/// faster.
pub fn device(choice: BackendChoice) -> Result<Box<dyn Device>, BackendError> {
    open(choice, |device| device)
}

/// As [`device`], for this model: with `Auto`, the CPU is used if the GPU cannot run it.
pub fn device_for(choice: BackendChoice, model: &Model) -> Result<Box<dyn Device>, BackendError> {
    let device = device(choice)?;
    match (choice, model.runs_on(device.as_ref())) {
        (BackendChoice::Auto, Err(error)) => {
            tracing::warn!("not on the GPU: {error}");
            Ok(Box::new(CpuDevice))
        }
        _ => Ok(device),
    }
}

fn open(
    choice: BackendChoice,
    with: impl FnOnce(GpuDevice) -> GpuDevice,
) -> Result<Box<dyn Device>, BackendError> {
    let with = |device: GpuDevice| {
        if let Some(dir) = config::cache_dir() {
            device.keep_pipelines(&dir.join("pipelines"));
        }
        with(device)
    };
    match choice {
        BackendChoice::Cpu => Ok(Box::new(CpuDevice)),
        BackendChoice::Gpu => Ok(Box::new(with(GpuDevice::open(AdapterChoice::Any)?))),
        BackendChoice::Auto => match GpuDevice::open(AdapterChoice::Hardware) {
            Ok(device) => Ok(Box::new(with(device))),
            Err(error) => {
                tracing::info!("no hardware GPU ({error}): using the CPU");
                Ok(Box::new(CpuDevice))
            }
        },
    }
}

/// As [`device`], but measures how long it computes if the adapter has timestamps.
pub fn timed_device(choice: BackendChoice) -> Result<Box<dyn Device>, BackendError> {
    open(choice, GpuDevice::timed)
}

/// Describes the choice before a device is opened.
pub const fn describe_choice(choice: BackendChoice) -> &'static str {
    match choice {
        BackendChoice::Auto => "auto",
        BackendChoice::Gpu => "gpu",
        BackendChoice::Cpu => "cpu",
    }
}

/// A prompt's tokens, at least one.
pub fn encode_prompt(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, EngineError> {
    let tokens = tokenizer.encode(prompt)?;
    if tokens.is_empty() {
        return Err(SessionError::EmptyPrompt.into());
    }
    Ok(tokens)
}

/// A finished generation.
pub struct Done {
    pub tokens: Vec<u32>,
    /// All of it, without the stop text.
    pub text: String,
    /// Its end, which was held back when its tokens came: it could have become a stop text, or is
    /// part of a character.
    pub rest: String,
    pub reason: StopReason,
    /// The stop text that ended it.
    pub stop_text: Option<String>,
    /// Tokens of the prompt whose keys and values the sequence had.
    pub reused: usize,
    pub logprobs: Vec<TokenOdds>,
    pub tok_s: f64,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    pub clamped: u64,
}

/// A token, and the text that it completes.
pub struct Piece {
    pub id: u32,
    /// Empty while a character or a stop text may still be going on.
    pub text: String,
    pub logprobs: Option<TokenOdds>,
}

/// Rewinds the sequence to what it and the prompt begin with, and returns the rest of the prompt, at
/// least its last token.
pub fn resume<'a>(sequence: &mut Sequence, prompt: &'a [u32]) -> &'a [u32] {
    let alike = sequence.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let alike = alike.min(prompt.len().saturating_sub(1));
    sequence.rewind(sequence.len() - alike);
    &prompt[alike..]
}

/// The text of an answer as its tokens come.
pub struct Writing<T> {
    tokenizer: T,
    stream: TextStream<T>,
    watch: Watch,
    text: String,
}

impl<T: Deref<Target = Tokenizer> + Clone> Writing<T> {
    pub fn new(tokenizer: T, asked: &Asked) -> Self {
        let stream = TextStream::new(tokenizer.clone(), &asked.request.prompt);
        Self { tokenizer, stream, watch: asked.stops.watch(), text: String::new() }
    }

    /// # Errors
    /// If the token cannot be decoded.
    pub fn push(&mut self, chosen: &Chosen) -> Result<Piece, TokenizerError> {
        let text = self.watch.push(&self.stream.push(chosen.token)?);
        self.text.push_str(&text);
        let logprobs = chosen.logprobs.as_ref().map(|odds| token_odds(&self.tokenizer, odds));
        Ok(Piece { id: chosen.token, text, logprobs })
    }

    /// Whether a stop text was found, which ends the answer.
    pub fn is_over(&self) -> bool {
        self.watch.found().is_some()
    }

    /// # Errors
    /// If what is still held back cannot be decoded.
    pub fn end(self, generated: Generated, reused: usize) -> Result<Done, TokenizerError> {
        let Self { stream, mut watch, mut text, .. } = self;
        let mut rest = watch.push(&stream.finish()?);
        let stop_text = watch.found().map(str::to_owned);
        rest.push_str(&watch.finish());
        text.push_str(&rest);
        let reason = if stop_text.is_some() { StopReason::StopString } else { generated.reason };
        Ok(Done {
            tok_s: generated.decode_tok_s(),
            clamped: generated.clamped,
            tokens: generated.tokens,
            reused,
            reason,
            text,
            rest,
            stop_text,
            logprobs: Vec::new(),
        })
    }
}

/// Generates the text that follows the prompt. The sequence goes on from what it and the prompt begin
/// with. `each` receives every token with its text, and returns false to stop.
pub fn generate(
    engine: &mut Engine,
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    asked: &Asked,
    mut each: impl FnMut(&Engine, &Piece) -> bool,
) -> Result<Done, EngineError> {
    let Request { prompt, options, .. } = &asked.request;
    let rest_of_prompt = resume(sequence, prompt);
    let mut writing = Writing::new(tokenizer, asked);
    let mut logprobs = Vec::new();
    let mut broken = None;
    let on_token = |engine: &Engine, chosen: &Chosen| {
        let piece = match writing.push(chosen) {
            Ok(piece) => piece,
            Err(error) => {
                broken = Some(error);
                return ControlFlow::Break(());
            }
        };
        let goes_on = each(engine, &piece);
        logprobs.extend(piece.logprobs);
        if goes_on && !writing.is_over() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    };
    let generated =
        doppler_infer::generate::generate(engine, sequence, rest_of_prompt, options, on_token)?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    let done = writing.end(generated, prompt.len() - rest_of_prompt.len())?;
    Ok(Done { logprobs, ..done })
}

/// Probabilities with the tokens' texts.
fn token_odds(tokenizer: &Tokenizer, odds: &Logprobs) -> TokenOdds {
    let one = |odds: &Logprob, top| {
        let text = tokenizer.decode(&[odds.token]).unwrap_or_default();
        TokenOdds { id: odds.token, text, logprob: odds.logprob, top }
    };
    one(&odds.chosen, odds.top.iter().map(|odds| one(odds, Vec::new())).collect())
}
