//! Embeddings of texts: tokens, states, pooling, normalisation, as sentence-transformers computes
//! them.
//!
//! Texts run one after another on an engine that was loaded with [`load_options`], so none is padded
//! and none depends on the others. A text that is too long loses its end, which is reported.

use super::backend::{KvFormat, LogitRows};
use super::engine::{Engine, LoadOptions, Rows};
use super::error::SessionError;
use super::families::{Pooling, Spec};
use super::model::Model;
use super::sampler::SamplerOptions;
use super::sequence::Sequence;
use super::tokenizer::{Tokenizer, TokenizerError};

/// The most texts of one request.
pub const TEXTS_MAX: usize = 2048;
/// The longest text in tokens, unless the model's own limit is lower. A text takes attention scores
/// and activations in one step.
pub const TOKENS_MAX: usize = 8192;

/// Why there are no embeddings.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    #[error("{0} makes text, not embeddings: use an embedding model")]
    NotEmbedding(String),
    #[error("there is no text to embed")]
    NoText,
    #[error("{0} texts at once, more than {TEXTS_MAX}")]
    Texts(usize),
    #[error("the model has no prompt {name:?} (known: {known})")]
    Prompt { name: String, known: String },
    #[error("text {0} has no tokens")]
    Empty(usize),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// What is asked of an embedding model.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub texts: &'a [String],
    /// The name of the prompt that is put before each text. `None` for the model's default, if it
    /// has one.
    pub prompt_name: Option<&'a str>,
}

/// A text's embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedded {
    pub vector: Vec<f32>,
    /// Tokens that were computed, prompt and special tokens included.
    pub tokens: usize,
    /// Tokens at the end that did not fit.
    pub cut: usize,
}

/// Texts as tokens, with which nothing is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    texts: Vec<Text>,
}

#[derive(Debug, Clone, PartialEq)]
struct Text {
    ids: Vec<u32>,
    cut: usize,
}

impl Prepared {
    /// Tokens of the longest text.
    pub fn longest(&self) -> usize {
        self.texts.iter().map(|text| text.ids.len()).max().unwrap_or(0)
    }
}

/// How an engine must be loaded to embed texts of at most this many tokens: each in one step if the
/// model sees a text as a whole, and with a cache without rounding.
pub fn load_options(model: &Model, longest: usize) -> LoadOptions {
    let tokens = longest.clamp(1, tokens_max(model));
    let (context, kv) = (Some(tokens), KvFormat::F32);
    let options = LoadOptions { context, kv, ..LoadOptions::default() };
    match model.graph.causal() {
        true => options,
        false => LoadOptions { batch: tokens, ..options },
    }
}

/// The most tokens of a text.
pub fn tokens_max(model: &Model) -> usize {
    let own = model.embedding.as_ref().and_then(|spec| spec.tokens_max);
    own.unwrap_or(TOKENS_MAX).min(TOKENS_MAX).min(model.graph.context_max)
}

/// Checks what is asked, and makes tokens of it. Loads and computes nothing.
///
/// # Errors
/// If the model does not embed, or a text or the prompt's name is wrong.
pub fn prepare(
    model: &Model,
    tokenizer: &Tokenizer,
    asked: &Asked<'_>,
) -> Result<Prepared, EmbedError> {
    let named = || EmbedError::NotEmbedding(model.manifest.model_id.clone());
    let spec = model.embedding.as_deref().ok_or_else(named)?;
    let prompt = prompt(spec, asked.prompt_name)?;
    match asked.texts.len() {
        0 => return Err(EmbedError::NoText),
        count if count > TEXTS_MAX => return Err(EmbedError::Texts(count)),
        _ => {}
    }
    let most = tokens_max(model);
    let texts = asked.texts.iter().enumerate().map(|(number, text)| {
        let mut text = format!("{prompt}{text}");
        if spec.lower_case {
            text = text.to_lowercase();
        }
        let (ids, cut) = tokenizer.encode_within(&text, most)?;
        let vocab = model.graph.vocab;
        match ids.iter().find(|id| **id as usize >= vocab) {
            _ if ids.is_empty() => Err(EmbedError::Empty(number + 1)),
            Some(id) => Err(SessionError::Token { token: *id, vocab }.into()),
            None => Ok(Text { ids, cut }),
        }
    });
    Ok(Prepared { texts: texts.collect::<Result<_, _>>()? })
}

/// The texts' embeddings, in order. The engine was loaded with [`load_options`].
///
/// # Errors
/// If the device fails, or a text is longer than the engine was loaded for.
pub fn run(
    engine: &mut Engine,
    model: &Model,
    prepared: &Prepared,
) -> Result<Vec<Embedded>, SessionError> {
    let Some(spec) = model.embedding.as_deref() else { return Ok(Vec::new()) };
    let embed = |Text { ids, cut }: &Text| {
        let states = states(engine, ids)?;
        let mut vector = pooled(&states, model.graph.result_width(), spec.pooling);
        if spec.normalise {
            normalise(&mut vector);
        }
        Ok(Embedded { vector, tokens: ids.len(), cut: *cut })
    };
    prepared.texts.iter().map(embed).collect()
}

fn prompt<'a>(spec: &'a Spec, name: Option<&str>) -> Result<&'a str, EmbedError> {
    let Some(name) = name.or(spec.default_prompt.as_deref()) else { return Ok("") };
    spec.prompts.get(name).map(String::as_str).ok_or_else(|| {
        let known: Vec<&str> = spec.prompts.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        EmbedError::Prompt { name: name.to_owned(), known }
    })
}

/// The states of all tokens after the dense heads, `[tokens, width]`. The upper bits of a token may
/// name its segment.
pub fn states(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<f32>, SessionError> {
    let mut sequence = Sequence::new(SamplerOptions::default(), tokens.len())?;
    let mut all = Vec::new();
    let batch = if engine.causal() { engine.batch() } else { tokens.len() };
    for tokens in tokens.chunks(batch.max(1)) {
        let rows = Rows { sequence: &mut sequence, tokens, logits: LogitRows::All };
        all.extend(engine.step(&mut [rows])?.pop().unwrap_or_default());
    }
    Ok(all)
}

/// One vector of all states, `[tokens, width]`.
pub fn pooled(states: &[f32], width: usize, pooling: Pooling) -> Vec<f32> {
    let rows = states.chunks_exact(width);
    match pooling {
        Pooling::First => rows.take(1).flatten().copied().collect(),
        Pooling::Last => rows.last().unwrap_or_default().to_vec(),
        Pooling::Mean => {
            let count = rows.len() as f64;
            let mut sums = vec![0.0; width];
            for row in rows {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            sums.iter().map(|sum| (sum / count) as f32).collect()
        }
    }
}

/// Scales to length 1. Zeros stay as they are.
pub fn normalise(vector: &mut [f32]) {
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

#[cfg(test)]
#[path = "embedding_tests.rs"]
mod tests;
