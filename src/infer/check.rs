//! The `check` command's library half: a model's logits and greedy continuation
//! against reference outputs of another implementation.
//!
//! Reference file (safetensors): `input_ids [n]` and `greedy [m]` in I64 or I32,
//! `logits [n, vocab]` in F32; a leading dimension of 1 is accepted. `greedy`
//! continues the first [`GREEDY_PROMPT`] input ids, or as many as `greedy_prefix [1]` says.

use safetensors::{Dtype, SafeTensors};
use serde::Serialize;

use super::backend::LogitRows;
use super::error::SessionError;
use super::sampler::greedy;
use super::session::Session;

/// How many of the input ids the reference's greedy continuation starts from, unless it says so.
pub const GREEDY_PROMPT: usize = 8;

/// The largest `rel` that passes, with bf16 weights and f32 arithmetic in another order.
pub const REL_MAX: f64 = 1e-3;

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("the reference file is not valid safetensors: {0}")]
    Format(String),
    #[error("the reference file has no tensor {0:?}")]
    Missing(&'static str),
    #[error("the reference file's {name}: {problem}")]
    Tensor { name: &'static str, problem: String },
    #[error("the reference has logits for {expected} tokens a position, the model for {model}")]
    Vocab { expected: usize, model: usize },
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Reference outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    pub input_ids: Vec<u32>,
    /// `[input_ids, vocab]`
    pub logits: Vec<f32>,
    pub vocab: usize,
    /// The greedy continuation of the first `prefix` input ids.
    pub greedy: Vec<u32>,
    pub prefix: usize,
}

/// How close a model came. Keys as `check --json` prints them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CheckReport {
    /// The largest difference between two logits.
    pub max_abs: f64,
    /// `max_abs` over the standard deviation of the reference logits.
    pub rel: f64,
    /// The share of positions at which both have the same likeliest token.
    pub top1_agree: f64,
    /// Whether every token of the greedy continuation is the same.
    pub greedy_match: bool,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    pub clamped: u64,
}

impl CheckReport {
    /// Whether this passes: `rel` is at most `rel_max` ([`REL_MAX`] unless the caller knows
    /// better), every top token and the continuation are equal, and nothing was clamped.
    pub fn passes(&self, rel_max: f64) -> bool {
        self.rel <= rel_max && self.top1_agree == 1.0 && self.greedy_match && self.clamped == 0
    }
}

impl Expected {
    /// Positions that a session must hold to be compared with this.
    pub fn positions(&self) -> usize {
        self.input_ids.len().max(self.prefix + self.greedy.len())
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, CheckError> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| CheckError::Format(e.to_string()))?;
        let input_ids = ids(&file, "input_ids")?;
        let greedy = ids(&file, "greedy")?;
        let name = "logits";
        let tensor = file.tensor(name).map_err(|_| CheckError::Missing(name))?;
        let wrong = |problem: String| CheckError::Tensor { name, problem };
        let shape = strip(tensor.shape());
        let vocab = match *shape {
            [rows, vocab] if rows == input_ids.len() && vocab > 0 => vocab,
            _ => return Err(wrong(format!("shape {shape:?} is not [{}, vocab]", input_ids.len()))),
        };
        let logits = floats(&file, name)?;
        if input_ids.is_empty() {
            return Err(CheckError::Tensor { name: "input_ids", problem: "it is empty".into() });
        }
        let prefix = match file.tensor("greedy_prefix") {
            Err(_) => GREEDY_PROMPT,
            Ok(_) => ids(&file, "greedy_prefix")?.first().map_or(0, |count| *count as usize),
        };
        if prefix == 0 {
            let problem = "it is not a number above 0".into();
            return Err(CheckError::Tensor { name: "greedy_prefix", problem });
        }
        Ok(Self { input_ids, logits, vocab, greedy, prefix })
    }
}

/// A list of token ids.
pub(super) fn ids(file: &SafeTensors<'_>, name: &'static str) -> Result<Vec<u32>, CheckError> {
    let tensor = file.tensor(name).map_err(|_| CheckError::Missing(name))?;
    let wrong = |problem: String| CheckError::Tensor { name, problem };
    if strip(tensor.shape()).len() != 1 {
        return Err(wrong(format!("shape {:?} is not a list", tensor.shape())));
    }
    let wide: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => {
            tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
        }
        Dtype::I32 => {
            let words = tensor.data().as_chunks::<4>().0.iter();
            words.map(|b| i64::from(i32::from_le_bytes(*b))).collect()
        }
        other => return Err(wrong(format!("type {other:?} is not I64 or I32"))),
    };
    let narrow = wide
        .iter()
        .map(|id| u32::try_from(*id).map_err(|_| wrong(format!("{id} is not a token id"))));
    narrow.collect()
}

/// The finite numbers of a tensor.
pub(super) fn floats(file: &SafeTensors<'_>, name: &'static str) -> Result<Vec<f32>, CheckError> {
    let tensor = file.tensor(name).map_err(|_| CheckError::Missing(name))?;
    let wrong = |problem: String| CheckError::Tensor { name, problem };
    if tensor.dtype() != Dtype::F32 {
        return Err(wrong(format!("type {:?} is not F32", tensor.dtype())));
    }
    let (words, _) = tensor.data().as_chunks::<4>();
    let numbers: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    match numbers.iter().find(|number| !number.is_finite()) {
        Some(odd) => Err(wrong(format!("it contains {odd}, which is not finite"))),
        None => Ok(numbers),
    }
}

/// The shape without a leading batch dimension of 1.
fn strip(shape: &[usize]) -> &[usize] {
    match shape {
        [1, rest @ ..] if !rest.is_empty() => rest,
        whole => whole,
    }
}

/// Runs the reference's input through the session (from its start) and compares.
pub fn check(session: &mut Session, expected: &Expected) -> Result<CheckReport, CheckError> {
    if expected.vocab != session.vocab() {
        return Err(CheckError::Vocab { expected: expected.vocab, model: session.vocab() });
    }
    let vocab = expected.vocab;
    let clamped = session.engine().clamped();
    session.reset();
    session.expect(expected.input_ids.len());
    let mut max_abs: f64 = 0.0;
    let mut agreeing = 0_usize;
    let mut reference = expected.logits.chunks_exact(vocab);
    for batch in expected.input_ids.chunks(session.batch()) {
        let logits = session.step(batch, LogitRows::All)?;
        for (ours, theirs) in logits.chunks_exact(vocab).zip(&mut reference) {
            for (a, b) in ours.iter().zip(theirs) {
                let difference = (f64::from(*a) - f64::from(*b)).abs();
                // `max` would drop a NaN, and a NaN must never look like agreement.
                max_abs = if difference.is_nan() { f64::INFINITY } else { max_abs.max(difference) };
            }
            agreeing += usize::from(greedy(ours) == greedy(theirs));
        }
    }
    let greedy_match = continues(session, expected)?;
    Ok(CheckReport {
        max_abs,
        rel: max_abs / deviation(&expected.logits),
        top1_agree: agreeing as f64 / expected.input_ids.len() as f64,
        greedy_match,
        clamped: session.engine().clamped() - clamped,
    })
}

/// Whether greedy decoding reproduces the reference's continuation.
fn continues(session: &mut Session, expected: &Expected) -> Result<bool, SessionError> {
    session.reset();
    let prompt = &expected.input_ids[..expected.prefix.min(expected.input_ids.len())];
    let mut logits = session.prefill(prompt)?;
    for (i, token) in expected.greedy.iter().enumerate() {
        if greedy(&logits) != *token {
            return Ok(false);
        }
        if i + 1 < expected.greedy.len() {
            logits = session.step(&[*token], LogitRows::Last)?;
        }
    }
    Ok(true)
}

/// Population standard deviation.
pub(super) fn deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().copied().map(f64::from).sum::<f64>() / count;
    let squares = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
    (squares / count).sqrt()
}
