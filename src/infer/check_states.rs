//! The `check` of embedding models: states and embeddings against those of another implementation.
//!
//! Reference file (safetensors): `input_ids [n]` in I64 or I32; `last_hidden_state [n, width]` in
//! F32; `embedding [width]`, and perhaps `embedding_cls [width]`. Where there is `attention_mask [n]`,
//! only tokens with a 1 count; `token_type_ids [n]` are their segments.

use safetensors::SafeTensors;
use serde::Serialize;

use super::check::{CheckError, floats, ids};
use super::embedding::{normalise, pooled, states};
use super::engine::Engine;
use super::families::Pooling;
use super::graph::{Graph, fed};
use super::model::Model;

/// The least cosine that passes.
pub const COSINE_MIN: f64 = 0.9999;

/// Reference outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpectedStates {
    /// Tokens with their segments.
    pub tokens: Vec<u32>,
    /// `[tokens, width]`
    pub states: Vec<f32>,
    pub width: usize,
    pub embedding: Vec<f32>,
    /// The embedding by the first token.
    pub first: Option<Vec<f32>>,
}

/// How close a model came. Keys as `check --json` prints them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StatesReport {
    /// The largest difference between two elements of states.
    pub max_abs: f64,
    /// `max_abs` over the standard deviation of the reference.
    pub rel: f64,
    /// Of the embeddings; the least, if there are several.
    pub cosine: f64,
}

impl StatesReport {
    pub fn passes(&self, rel_max: f64) -> bool {
        self.rel <= rel_max && self.cosine >= COSINE_MIN
    }
}

impl ExpectedStates {
    /// `None` if the file is the reference of a model that makes text.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, CheckError> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| CheckError::Format(e.to_string()))?;
        if file.tensor("last_hidden_state").is_err() {
            return Ok(None);
        }
        let input = ids(&file, "input_ids")?;
        let list = |name, default: u32| match file.tensor(name) {
            Err(_) => Ok(vec![default; input.len()]),
            Ok(_) => ids(&file, name),
        };
        let (mask, segments) = (list("attention_mask", 1)?, list("token_type_ids", 0)?);
        let states = floats(&file, "last_hidden_state")?;
        let width = states.len().checked_div(input.len()).unwrap_or(0);
        let problem = match () {
            () if width == 0 || width * input.len() != states.len() => "not [tokens, width]",
            () if mask.len() != input.len() || segments.len() != input.len() => {
                "masks of another length"
            }
            () if !mask.iter().is_sorted_by(|a, b| a >= b) => "a mask with a hole",
            () if mask.first() != Some(&1) => "a mask of all tokens",
            () => "",
        };
        if !problem.is_empty() {
            let problem = problem.to_owned();
            return Err(CheckError::Tensor { name: "last_hidden_state", problem });
        }
        let count = mask.iter().filter(|mask| **mask == 1).count();
        let tokens = input.iter().zip(&segments).take(count).map(|(id, part)| fed(*id, *part));
        let first = match file.tensor("embedding_cls") {
            Err(_) => None,
            Ok(_) => Some(floats(&file, "embedding_cls")?),
        };
        Ok(Some(Self {
            tokens: tokens.collect(),
            states: states[..count * width].to_vec(),
            width,
            embedding: floats(&file, "embedding")?,
            first,
        }))
    }
}

/// Runs the reference's input through the engine and compares. The reference's states are those
/// before dense heads, so a model with such heads cannot be compared.
///
/// # Errors
/// If the model does not embed, or the widths differ.
pub fn check_states(
    engine: &mut Engine,
    model: &Model,
    expected: &ExpectedStates,
) -> Result<StatesReport, CheckError> {
    let width = width_of(&model.graph);
    let Some(spec) = model.embedding.as_deref().filter(|_| width == expected.width) else {
        return Err(CheckError::Vocab { expected: expected.width, model: width });
    };
    let got = states(engine, &expected.tokens)?;
    let mut max_abs: f64 = 0.0;
    for (a, b) in got.iter().zip(&expected.states) {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        max_abs = if difference.is_nan() { f64::INFINITY } else { max_abs.max(difference) };
    }
    let against = |pooling, want: &[f32]| {
        let mut vector = pooled(&got, width, pooling);
        normalise(&mut vector);
        cosine(&vector, want)
    };
    let first = expected.first.as_deref().map(|want| against(Pooling::First, want));
    let own = against(spec.pooling, &expected.embedding);
    let rel = max_abs / super::check::deviation(&expected.states);
    Ok(StatesReport { max_abs, rel, cosine: first.map_or(own, |first| first.min(own)) })
}

fn width_of(graph: &Graph) -> usize {
    graph.result_width()
}

/// The cosine of the angle between two vectors; 0 if they have different lengths.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return 0.0;
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
