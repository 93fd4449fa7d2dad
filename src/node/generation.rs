//! Connects text and the engine's tokens: opens devices by name, takes prompts, and produces text.

use std::ops::ControlFlow;

use super::args::BackendChoice;
use super::config;
use super::engine::EngineError;
use doppler_infer::backend::{BackendError, Device};
use doppler_infer::cpu::CpuDevice;
use doppler_infer::engine::Engine;
use doppler_infer::error::SessionError;
use doppler_infer::generate::StopReason;
use doppler_infer::gpu::{AdapterChoice, GpuDevice};
use doppler_infer::model::Model;
use doppler_infer::request::Request;
use doppler_infer::sequence::Sequence;
use doppler_infer::tokenizer::Tokenizer;

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
    pub text: String,
    pub reason: StopReason,
    pub tok_s: f64,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    pub clamped: u64,
}

/// Generates text that continues the sequence. `each` receives every token with the text that it
/// completes (empty if a character is still incomplete), and returns false to stop.
pub fn generate(
    engine: &mut Engine,
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    request: &Request,
    mut each: impl FnMut(&Engine, u32, &str) -> bool,
) -> Result<Done, EngineError> {
    let Request { prompt, options, .. } = request;
    let mut stream = tokenizer.stream(prompt);
    let mut text = String::new();
    let mut broken = None;
    let generated =
        doppler_infer::generate::generate(engine, sequence, prompt, options, |engine, token| {
            let piece = match stream.push(token) {
                Ok(piece) => piece,
                Err(error) => {
                    broken = Some(error);
                    return ControlFlow::Break(());
                }
            };
            text.push_str(&piece);
            if each(engine, token, &piece) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    text.push_str(&stream.finish()?);
    Ok(Done {
        tok_s: generated.decode_tok_s(),
        clamped: generated.clamped,
        tokens: generated.tokens,
        reason: generated.reason,
        text,
    })
}
