//! Calls of tools in a model's text. Pure.
//!
//! A model writes a call as its chat template shows it to. [`Syntax::of`] tells from the template
//! which of the known ways that is; [`Parser`] takes the text as it comes and gives out what is text
//! at once, and a call as soon as all of it is there. What looks like a call but is not JSON, or
//! names no offered tool, is text: nothing that the model said is lost.

mod bare;
pub mod held;
mod hermes;
mod llama;
mod mistral;

use serde_json::Value;

use self::bare::Bare;

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM.
    Hermes,
    /// The whole answer is `{"name": ..., "parameters": {...}}`: Llama 3.1, 3.2, 3.3.
    Llama,
    /// `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`: Mistral.
    Mistral,
    /// `[TOOL_CALLS]NAME[ARGS]{...}`: Mistral since the end of 2024.
    MistralNamed,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    Text(String),
    Call(Call),
}

/// A call of a tool; `arguments` is a JSON object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    pub arguments: String,
}

/// Texts of tokens that a parser must see although they are special, so that text leaves them out.
const MARKERS: [&str; 5] =
    [hermes::OPEN, hermes::CLOSE, mistral::OPEN, mistral::ARGUMENTS, llama::TAG];

impl Syntax {
    /// The syntax that a template teaches. `None` if it offers no tools, or in an unknown way.
    pub fn of(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        match () {
            () if !has("tools") => None,
            () if has(mistral::OPEN) && has(mistral::ARGUMENTS) => Some(Self::MistralNamed),
            () if has(mistral::OPEN) => Some(Self::Mistral),
            // GLM's and Qwen-Coder's own ways between the same tags.
            () if has("<arg_key>") || has("<function=") => None,
            () if has(hermes::OPEN) => Some(Self::Hermes),
            () if has(llama::TAG) || has("\"parameters\":") => Some(Self::Llama),
            () => None,
        }
    }

    /// How an answer begins that must call a tool; the one of this name, if there is one.
    pub fn begin(self, name: Option<&str>) -> String {
        let quoted = name.map(|name| Value::from(name).to_string());
        let json = |arguments: &str| match &quoted {
            Some(name) => format!("{{\"name\": {name}, \"{arguments}\":"),
            None => "{\"name\": \"".to_owned(),
        };
        match self {
            Self::Hermes => format!("{}\n{}", hermes::OPEN, json("arguments")),
            Self::Llama => json("parameters"),
            Self::Mistral => format!("{} [{}", mistral::OPEN, json("arguments")),
            Self::MistralNamed => match name {
                Some(name) => format!("{}{name}{}", mistral::OPEN, mistral::ARGUMENTS),
                None => mistral::OPEN.to_owned(),
            },
        }
    }

    /// What the arguments are called in a call.
    const fn key(self) -> &'static str {
        match self {
            Self::Llama => "parameters",
            Self::Hermes | Self::Mistral | Self::MistralNamed => "arguments",
        }
    }

    /// The special tokens, as `id_of` knows them, that a parser must see.
    pub fn markers(
        id_of: impl Fn(&str) -> Option<u32>,
        is_special: impl Fn(u32) -> bool,
    ) -> Vec<(u32, &'static str)> {
        let marker = |text| id_of(text).filter(|id| is_special(*id)).map(|id| (id, text));
        MARKERS.into_iter().filter_map(marker).collect()
    }
}

/// Finds calls in a text that comes in pieces.
#[derive(Debug, Clone)]
pub struct Parser {
    syntax: Syntax,
    /// The offered tools.
    names: Vec<String>,
    /// What is not given out yet.
    held: String,
    /// Whether `held` belongs to a call, or, for Llama, what the whole answer is.
    state: State,
    /// White space before a call is not text.
    space: String,
    called: bool,
    /// Follows an answer that may be calls without marks.
    bare: Option<Bare>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Outside,
    Inside,
    /// Nothing but text comes any more.
    Plain,
}

impl Parser {
    pub fn new(syntax: Syntax, names: Vec<String>) -> Self {
        let (held, space) = (String::new(), String::new());
        // Llama's calls have no marks anyway.
        let bare = (syntax != Syntax::Llama).then(Bare::new);
        Self { syntax, names, held, state: State::Outside, space, called: false, bare }
    }

    /// What this piece completes.
    pub fn push(&mut self, text: &str) -> Vec<Found> {
        self.held.push_str(text);
        let mut found = Vec::new();
        if let Some(bare) = &mut self.bare {
            if bare.take(text, &self.names) {
                return found;
            }
            self.bare = None;
        }
        match self.syntax {
            Syntax::Hermes => self.push_hermes(&mut found),
            Syntax::Llama => self.push_llama(&mut found),
            Syntax::Mistral | Syntax::MistralNamed => self.push_mistral(&mut found),
        }
        found
    }

    /// What is left at the end.
    pub fn finish(mut self) -> Vec<Found> {
        let mut found = Vec::new();
        if self.bare.take().is_some() {
            match self.bare_calls() {
                Some(calls) => {
                    self.calls(calls, &mut found);
                    return found;
                }
                None => found = self.push(""),
            }
        }
        match self.syntax {
            Syntax::Hermes => self.finish_hermes(&mut found),
            Syntax::Llama => self.finish_llama(&mut found),
            Syntax::Mistral | Syntax::MistralNamed => self.finish_mistral(&mut found),
        }
        if !self.called && !self.space.is_empty() {
            found.push(Found::Text(std::mem::take(&mut self.space)));
        }
        found
    }

    /// Gives out text, but holds back white space at its end: before a call it is none.
    fn text(&mut self, text: &str, found: &mut Vec<Found>) {
        let solid = text.trim_end();
        if solid.is_empty() {
            self.space.push_str(text);
            return;
        }
        let mut out = std::mem::take(&mut self.space);
        out.push_str(solid);
        self.space.push_str(&text[solid.len()..]);
        found.push(Found::Text(out));
    }

    fn calls(&mut self, calls: Vec<Call>, found: &mut Vec<Found>) {
        self.called |= !calls.is_empty();
        self.space.clear();
        found.extend(calls.into_iter().map(Found::Call));
    }

    /// The call that a JSON value is, if it is one of an offered tool.
    fn call(&self, value: &Value) -> Option<Call> {
        let name = value.get("name")?.as_str()?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        self.named(name, arguments.unwrap_or(&Value::Object(Default::default())))
    }

    fn named(&self, name: &str, arguments: &Value) -> Option<Call> {
        // Some models write the object as a string.
        let inner = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
        let arguments = inner.as_ref().unwrap_or(arguments);
        let is_offered = self.names.iter().any(|offered| offered == name);
        (is_offered && arguments.is_object())
            .then(|| Call { name: name.to_owned(), arguments: arguments.to_string() })
    }

    /// Gives out what is text for sure while `open` may begin at its end; true once it is there, and
    /// what is held begins behind it.
    fn seek(&mut self, open: &str, found: &mut Vec<Found>) -> bool {
        let (at, is_there) = match self.held.find(open) {
            Some(at) => (at, true),
            None => (self.held.len() - overlap(&self.held, open), false),
        };
        let rest = self.held.split_off(at);
        let text = std::mem::replace(&mut self.held, rest);
        self.text(&text, found);
        if is_there {
            self.held.drain(..open.len());
            self.state = State::Inside;
        }
        is_there
    }
}

/// How many bytes at the end of `text` could be the beginning of `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    let longest = mark.len().saturating_sub(1).min(text.len());
    (1..=longest).rev().find(|length| text.ends_with(&mark[..*length])).unwrap_or(0)
}

#[cfg(test)]
mod tests;
