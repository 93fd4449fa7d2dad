//! Calls that are the whole answer: one JSON object, or several with `;` between them.

use serde_json::Value;

use super::{Call, Found, Parser, State};

/// What some of the models write before a call.
pub const TAG: &str = "<|python_tag|>";

impl Parser {
    /// An answer that begins with a brace may be a call until its end; any other is text.
    pub(super) fn push_llama(&mut self, found: &mut Vec<Found>) {
        if self.state == State::Outside {
            let begin = self.held.trim_start();
            let may_be = begin.is_empty() || begin.starts_with('{') || begin.starts_with(TAG);
            if !may_be && !TAG.starts_with(begin) {
                self.state = State::Plain;
            }
        }
        if self.state == State::Plain {
            let text = std::mem::take(&mut self.held);
            self.text(&text, found);
        }
    }

    pub(super) fn finish_llama(&mut self, found: &mut Vec<Found>) {
        let held = std::mem::take(&mut self.held);
        match self.all_calls(&held) {
            Some(calls) if !calls.is_empty() => self.calls(calls, found),
            _ => self.text(&held, found),
        }
    }

    /// The calls that the text consists of, if it does.
    fn all_calls(&self, text: &str) -> Option<Vec<Call>> {
        let mut rest = text.trim();
        rest = rest.strip_prefix(TAG).unwrap_or(rest);
        let mut calls = Vec::new();
        while !rest.trim_start_matches([';', ' ', '\n']).is_empty() {
            rest = rest.trim_start_matches([';', ' ', '\n']);
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let value = values.next()?.ok()?;
            calls.push(self.call(&value)?);
            rest = &rest[values.byte_offset()..];
        }
        Some(calls)
    }
}
