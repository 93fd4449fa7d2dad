//! Perplexity of a token sequence: `exp` of the mean negative log-likelihood (nats per token), in
//! windows that do not overlap.
//!
//! The text is cut into consecutive windows; each starts from an empty cache. If there is a
//! beginning-of-sequence token, every window starts with it and all of the window's text tokens are
//! scored. Otherwise the window's first token is context only. So a token sees at most its own
//! window.

use serde::Serialize;

use super::backend::LogitRows;
use super::error::SessionError;
use super::session::Session;

/// How the text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// Positions per window, including a beginning-of-sequence token. Clamped to the session's
    /// context; at least 2.
    pub window: usize,
    /// Put before each window.
    pub bos: Option<u32>,
}

/// The result over the windows so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Perplexity {
    pub perplexity: f64,
    /// Nats per token.
    pub mean_nll: f64,
    /// Tokens scored.
    pub tokens: usize,
    pub windows: usize,
}

/// Scores `tokens`; `on_window` sees the running result after each window.
///
/// # Errors
/// If there is no token to score (a scored token needs one before it), or a step fails.
pub fn perplexity(
    session: &mut Session,
    tokens: &[u32],
    options: &PerplexityOptions,
    mut on_window: impl FnMut(&Perplexity),
) -> Result<Perplexity, SessionError> {
    let window = options.window.min(session.context()).max(2);
    let text = window - usize::from(options.bos.is_some());
    let mut nll_sum = 0.0;
    let mut result = Perplexity { perplexity: 1.0, ..Perplexity::default() };
    for chunk in tokens.chunks(text) {
        let input: Vec<u32> = options.bos.into_iter().chain(chunk.iter().copied()).collect();
        if input.len() < 2 {
            continue;
        }
        session.reset();
        // What the last token predicts is outside the window.
        let mut targets = input[1..].iter();
        for batch in input[..input.len() - 1].chunks(session.batch()) {
            let logits = session.step(batch, LogitRows::All)?;
            for (row, target) in logits.chunks_exact(session.vocab()).zip(&mut targets) {
                nll_sum += nll(row, *target, session.vocab())?;
            }
        }
        result.tokens += input.len() - 1;
        result.windows += 1;
        result.mean_nll = nll_sum / result.tokens as f64;
        result.perplexity = result.mean_nll.exp();
        if !result.perplexity.is_finite() {
            let (tokens, nats) = (result.tokens, result.mean_nll);
            return Err(SessionError::Perplexity { tokens, nats });
        }
        on_window(&result);
    }
    if result.tokens == 0 {
        return Err(SessionError::NothingToScore);
    }
    Ok(result)
}

/// `-ln softmax(logits)[target]`.
fn nll(logits: &[f32], target: u32, vocab: usize) -> Result<f64, SessionError> {
    let wanted = logits.get(target as usize);
    let wanted = wanted.ok_or(SessionError::Token { token: target, vocab })?;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    Ok(sum.ln() - f64::from(wanted - max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likelihood_of_equal_logits_is_one_over_their_number() {
        let nll = nll(&[3.0; 50], 7, 50).unwrap();
        assert!((nll - 50_f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn a_certain_token_costs_nothing_and_a_foreign_one_is_an_error() {
        assert!(nll(&[0.0, 100.0], 1, 2).unwrap() < 1e-12);
        assert!((nll(&[0.0, 100.0], 0, 2).unwrap() - 100.0).abs() < 1e-9);
        assert!(matches!(nll(&[0.0, 1.0], 2, 2), Err(SessionError::Token { token: 2, vocab: 2 })));
    }
}
