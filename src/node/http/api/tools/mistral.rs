//! Calls behind a mark: a JSON list, or a name, a second mark and an object, for each call.

use serde_json::Value;

use super::{Call, Found, Parser, State};

pub const OPEN: &str = "[TOOL_CALLS]";
pub const ARGUMENTS: &str = "[ARGS]";

impl Parser {
    pub(super) fn push_mistral(&mut self, found: &mut Vec<Found>) {
        if self.state == State::Outside {
            self.seek(OPEN, found);
        }
    }

    pub(super) fn finish_mistral(&mut self, found: &mut Vec<Found>) {
        let held = std::mem::take(&mut self.held);
        if self.state == State::Outside {
            return self.text(&held, found);
        }
        let parts: Option<Vec<_>> = held.split(OPEN).map(|part| self.listed(part)).collect();
        match parts.map(|parts| parts.concat()) {
            Some(calls) if !calls.is_empty() => self.calls(calls, found),
            _ => self.text(&format!("{OPEN}{held}"), found),
        }
    }

    /// The calls behind one mark.
    fn listed(&self, part: &str) -> Option<Vec<Call>> {
        let part = part.trim();
        if part.starts_with(['[', '{']) {
            // A list that ends too early lacks its bracket only.
            let value = serde_json::from_str(part);
            let value =
                value.or_else(|_| serde_json::from_str::<Value>(&format!("{part}]"))).ok()?;
            let single = std::slice::from_ref(&value);
            let list = value.as_array().map_or(single, Vec::as_slice);
            return list.iter().map(|value| self.call(value)).collect();
        }
        let (name, arguments) = part.split_at(part.find(['[', '{'])?);
        let arguments = arguments.strip_prefix(ARGUMENTS).unwrap_or(arguments);
        let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
        Some(vec![self.named(name.trim(), &arguments)?])
    }
}
