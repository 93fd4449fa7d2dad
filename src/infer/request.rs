//! A generation checked against its model before anything is loaded or touched.
//!
//! Refuses what can be known in advance: an empty prompt, a prompt that does not fit the context,
//! token ids outside the vocabulary, sampling options out of range. A request that passes fits the
//! model, so a bad one never costs a load.

use super::error::SessionError;
use super::generate::{GenerateOptions, ROOM};
use super::graph::Graph;
use super::sampler::Sampler;

/// A prompt and its options that fit a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    /// Positions that the generation may use: the prompt and at most `max_tokens`, within the
    /// requested limit and the model's own.
    pub context: usize,
}

impl Request {
    /// `limit` is the number of positions that the caller allows; `None` means the model's own
    /// maximum.
    ///
    /// # Errors
    /// If an option is out of range, the model was not made for the limit, or the prompt does not
    /// fit.
    pub fn check(
        graph: &Graph,
        prompt: Vec<u32>,
        options: GenerateOptions,
        limit: Option<usize>,
    ) -> Result<Self, SessionError> {
        Sampler::with(options.sampler, options.extras.clone())?;
        if graph.embeds() {
            return Err(SessionError::NotText);
        }
        let max = graph.context_max;
        let limit = limit.unwrap_or(max);
        if limit == 0 || limit > max {
            return Err(SessionError::Context { context: limit, max });
        }
        if prompt.is_empty() {
            return Err(SessionError::EmptyPrompt);
        }
        if prompt.len() > limit {
            return Err(SessionError::Prompt { tokens: prompt.len(), context: limit });
        }
        let biased = options.extras.bias.iter().map(|(token, _)| token);
        if let Some(token) =
            prompt.iter().chain(biased).find(|token| **token as usize >= graph.vocab)
        {
            return Err(SessionError::Token { token: *token, vocab: graph.vocab });
        }
        // An unbounded number of tokens is bounded by the context.
        let context = prompt.len().saturating_add(options.max_tokens).min(limit);
        Ok(Self { prompt, options, context })
    }
}

impl Request {
    /// Positions for which room is made before the generation begins.
    pub fn room(&self) -> usize {
        let tokens = self.options.max_tokens.min(ROOM);
        self.prompt.len().saturating_add(tokens).min(self.context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extras::Extras;
    use crate::sampler::SamplerOptions;

    fn check(
        prompt: &[u32],
        options: GenerateOptions,
        limit: Option<usize>,
    ) -> Result<Request, SessionError> {
        let graph = Graph { vocab: 10, context_max: 64, ..Graph::default() };
        Request::check(&graph, prompt.to_vec(), options, limit)
    }

    fn tokens(max_tokens: usize) -> GenerateOptions {
        GenerateOptions { max_tokens, ..GenerateOptions::default() }
    }

    #[test]
    fn what_can_be_known_beforehand_is_refused_by_name() {
        let top_p = SamplerOptions { top_p: 0.0, ..SamplerOptions::default() };
        let top_p = GenerateOptions { sampler: top_p, ..tokens(1) };
        let label = |result: Result<Request, SessionError>| result.unwrap_err().label();
        assert_eq!(label(check(&[1], top_p, None)), "sampling");
        assert_eq!(label(check(&[], tokens(1), None)), "empty_prompt");
        assert_eq!(label(check(&[1], tokens(1), Some(65))), "context");
        assert_eq!(label(check(&[1], tokens(1), Some(0))), "context");
        assert_eq!(label(check(&[1; 65], tokens(1), None)), "prompt_too_long");
        assert_eq!(label(check(&[1; 9], tokens(1), Some(8))), "prompt_too_long");
        assert_eq!(label(check(&[1, 10], tokens(1), None)), "token");
        let bias = |token, by| {
            let extras = Extras { bias: [(token, by)].into(), ..Extras::default() };
            GenerateOptions { extras, ..tokens(1) }
        };
        assert_eq!(label(check(&[1], bias(10, 1.0), None)), "token");
        assert_eq!(label(check(&[1], bias(9, f32::NAN), None)), "sampling");
        assert!(check(&[1], bias(9, 1.0), None).is_ok());
    }

    #[test]
    fn room_is_made_for_prompt_and_tokens_and_never_wraps() {
        assert_eq!(check(&[1; 8], tokens(4), None).unwrap().context, 12);
        assert_eq!(check(&[1; 8], tokens(4), Some(10)).unwrap().context, 10);
        assert_eq!(check(&[1; 8], tokens(usize::MAX), None).unwrap().context, 64);
        assert_eq!(check(&[1; 64], tokens(usize::MAX), None).unwrap().context, 64);
    }
}
