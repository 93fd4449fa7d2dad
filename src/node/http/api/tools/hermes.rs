//! Calls between tags, any number of them, after and between text.

use serde_json::Value;

use super::{Found, Parser, State};

pub const OPEN: &str = "<tool_call>";
pub const CLOSE: &str = "</tool_call>";

impl Parser {
    pub(super) fn push_hermes(&mut self, found: &mut Vec<Found>) {
        loop {
            if self.state != State::Inside && !self.seek(OPEN, found) {
                return;
            }
            // The closing tag may also stand in an argument: the call ends where it is JSON.
            let mut ends = self.held.match_indices(CLOSE).map(|(at, _)| at);
            let whole = ends.find_map(|at| Some((at, self.parsed(&self.held[..at])?)));
            let Some((at, call)) = whole else { return };
            self.held.drain(..at + CLOSE.len());
            self.state = State::Outside;
            self.calls(vec![call], found);
        }
    }

    pub(super) fn finish_hermes(&mut self, found: &mut Vec<Found>) {
        let held = std::mem::take(&mut self.held);
        match (self.state, self.parsed(&held)) {
            // The model stopped before the closing tag.
            (State::Inside, Some(call)) => self.calls(vec![call], found),
            (State::Inside, None) => self.text(&format!("{OPEN}{held}"), found),
            _ => self.text(&held, found),
        }
    }

    fn parsed(&self, text: &str) -> Option<super::Call> {
        self.call(&serde_json::from_str::<Value>(text.trim()).ok()?)
    }
}
