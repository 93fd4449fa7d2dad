//! Calls without the marks that a template teaches: an answer that as a whole is JSON of calls, perhaps
//! in a fence, as small models write them.
//!
//! Follows the text as it comes and says as soon as it cannot be one any more, so that no other answer is
//! held back: another beginning than `{` or a fence, a member that no call has, another tool's name,
//! text behind the object.

use serde_json::Value;

use super::{Call, Parser};

/// Members of a call.
const KEYS: [&str; 3] = ["name", "arguments", "parameters"];
/// How a fence begins; what follows on its line is the language.
const FENCE: &str = "```";
const LANGUAGES: [&str; 2] = ["json", ""];

/// Where in the answer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the first object: white space, or the line of a fence.
    Before,
    Object,
    /// Behind an object: white space, another object, or the end of the fence.
    Behind,
    /// It is no call.
    Never,
}

/// An answer that may be a call.
#[derive(Debug, Clone)]
pub(super) struct Bare {
    place: Place,
    /// The fence's line so far, or its end.
    line: String,
    fenced: bool,
    /// How many objects and lists are open.
    depth: usize,
    /// The string that is open, and whether its next character is escaped.
    string: Option<String>,
    escaped: bool,
    /// Whether the next string of the outermost object is a key, and the last key.
    expects_key: bool,
    key: String,
}

impl Bare {
    pub const fn new() -> Self {
        Self {
            place: Place::Before,
            line: String::new(),
            fenced: false,
            depth: 0,
            string: None,
            escaped: false,
            expects_key: false,
            key: String::new(),
        }
    }

    /// Takes the next characters. False once it can be no call of these tools.
    pub fn take(&mut self, text: &str, names: &[String]) -> bool {
        for character in text.chars() {
            match self.place {
                Place::Before => self.before(character),
                Place::Object => self.object(character, names),
                Place::Behind => self.behind(character),
                Place::Never => {}
            }
            if self.place == Place::Never {
                return false;
            }
        }
        true
    }

    fn before(&mut self, character: char) {
        let is_line = !self.line.is_empty();
        match character {
            '{' if !is_line => self.open(),
            '`' if self.line.len() < FENCE.len() && !self.fenced => self.line.push('`'),
            '\n' if is_line => {
                let language = self.line.strip_prefix(FENCE).map(str::trim);
                self.fenced = language.is_some_and(|language| LANGUAGES.contains(&language));
                self.place = if self.fenced { Place::Before } else { Place::Never };
                self.line.clear();
            }
            letter if self.line.starts_with(FENCE) => {
                self.line.push(letter);
                let language = self.line[FENCE.len()..].trim();
                if !LANGUAGES.iter().any(|known| known.starts_with(language)) {
                    self.place = Place::Never;
                }
            }
            space if space.is_whitespace() && !is_line => {}
            _ => self.place = Place::Never,
        }
    }

    fn behind(&mut self, character: char) {
        match character {
            '{' if self.line.is_empty() => self.open(),
            '`' if self.fenced && self.line.len() < FENCE.len() => self.line.push('`'),
            space if space.is_whitespace() => {}
            _ => self.place = Place::Never,
        }
    }

    fn open(&mut self) {
        (self.place, self.depth, self.expects_key) = (Place::Object, 1, true);
    }

    fn object(&mut self, character: char, names: &[String]) {
        if let Some(string) = &mut self.string {
            match character {
                _ if std::mem::take(&mut self.escaped) => {}
                '\\' => self.escaped = true,
                '"' => {
                    self.string = None;
                    return;
                }
                _ => {}
            }
            if self.depth > 1 {
                return;
            }
            string.push(character);
            let begins = |of: &str| of.starts_with(string.as_str()) || string.contains('\\');
            let fits = match self.expects_key {
                true => KEYS.iter().any(|key| begins(key)),
                false => self.key != KEYS[0] || names.iter().any(|name| begins(name)),
            };
            if self.expects_key {
                self.key.clone_from(string);
            }
            if !fits {
                self.place = Place::Never;
            }
            return;
        }
        match character {
            '"' => self.string = Some(String::new()),
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    self.place = Place::Behind;
                }
            }
            ':' if self.depth == 1 => self.expects_key = false,
            ',' if self.depth == 1 => self.expects_key = true,
            _ => {}
        }
    }
}

impl Parser {
    /// The calls that an answer as a whole is, if it is nothing else.
    pub(super) fn bare_calls(&self) -> Option<Vec<Call>> {
        let mut text = self.held.trim();
        if let Some(fenced) = text.strip_prefix(FENCE) {
            let (_, inner) = fenced.split_once('\n')?;
            // A fence that is not closed was cut off behind the object.
            text = inner.trim_end().trim_end_matches('`');
        }
        let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        let call = |value: Result<Value, _>| {
            let value = value.ok()?;
            let has_arguments = KEYS[1..].iter().any(|key| value.get(key).is_some());
            has_arguments.then(|| self.call(&value)).flatten()
        };
        let calls: Option<Vec<Call>> = values.map(call).collect();
        calls.filter(|calls| !calls.is_empty())
    }
}
