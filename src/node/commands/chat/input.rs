//! What is said to the model: lines that a person edits, with a history, or a script's lines.
//!
//! A line that ends with a backslash goes on in the next one. The history is kept in memory only.

use std::io::{BufRead, IsTerminal};

use anyhow::Context;
use rustyline::config::Config;
use rustyline::error::ReadlineError;

use doppler_infer::tokenizer::PROMPT_BYTES_MAX;

/// Lines that can be recalled.
const HISTORY_MAX: usize = 500;
const PROMPT: &str = ">>> ";
const PROMPT_MORE: &str = "... ";

/// What was read.
pub enum Heard {
    Text(String),
    /// An empty line, or one that was dropped by Ctrl-C.
    Nothing,
    /// Ctrl-D, or the end of a script.
    End,
}

pub enum Input {
    Person(Box<rustyline::DefaultEditor>),
    Script,
}

impl Input {
    pub fn open() -> anyhow::Result<Self> {
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self::Script);
        }
        let config = Config::builder().max_history_size(HISTORY_MAX)?.auto_add_history(true);
        let editor = rustyline::DefaultEditor::with_config(config.build());
        Ok(Self::Person(Box::new(editor.context("cannot use this terminal")?)))
    }

    /// Whether somebody types.
    pub const fn is_person(&self) -> bool {
        matches!(self, Self::Person(_))
    }

    pub fn read(&mut self) -> anyhow::Result<Heard> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { PROMPT } else { PROMPT_MORE };
            let line = match self {
                Self::Person(editor) => match editor.readline(prompt) {
                    Ok(line) => line,
                    Err(ReadlineError::Interrupted) => {
                        crate::output::note!("(Ctrl-D or /bye ends the chat)");
                        return Ok(Heard::Nothing);
                    }
                    Err(ReadlineError::Eof) => return Ok(Heard::End),
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                },
                Self::Script => match script_line(&mut std::io::stdin().lock())? {
                    Some(line) => line,
                    None if text.trim().is_empty() => return Ok(Heard::End),
                    None => return Ok(Heard::Text(text)),
                },
            };
            match line.strip_suffix('\\') {
                Some(begun) if text.len() + begun.len() < PROMPT_BYTES_MAX => {
                    text += begun;
                    text.push('\n');
                }
                _ => {
                    text += &line;
                    break;
                }
            }
        }
        Ok(if text.trim().is_empty() { Heard::Nothing } else { Heard::Text(text) })
    }
}

/// The next line, without its end. `None` at the end of the input.
fn script_line(from: &mut impl BufRead) -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let most = PROMPT_BYTES_MAX as u64;
    let taken = std::io::Read::take(from, most).read_until(b'\n', &mut line);
    if taken.context("cannot read standard input")? == 0 {
        return Ok(None);
    }
    let line = String::from_utf8(line).context("standard input is not UTF-8 text")?;
    Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_read_line_by_line() {
        let mut from = &b"one\r\ntwo\n\nlast"[..];
        let mut next = || script_line(&mut from).unwrap();
        assert_eq!(next().as_deref(), Some("one"));
        assert_eq!(next().as_deref(), Some("two"));
        assert_eq!(next().as_deref(), Some(""));
        assert_eq!(next().as_deref(), Some("last"));
        assert_eq!(next(), None);
        assert!(script_line(&mut &b"\xff\n"[..]).is_err());
    }
}
