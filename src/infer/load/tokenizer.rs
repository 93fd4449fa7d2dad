//! A checkpoint's tokenizer as it is stored: usable, compact, and without limits that clip text.
//!
//! The training may have left `truncation` and `padding` in a tokenizer's file. They are meant for
//! batches of training text and would clip or pad prompts; Transformers resets both before it
//! encodes. They are stored as `null`. Everything else stays as written.

use serde::de::IgnoredAny;

use super::checkpoint::Checkpoint;
use super::{LoadError, Result};
use crate::tokenizer::Tokenizer;

/// Its file name beside a manifest.
pub const FILE: &str = "tokenizer.json";

/// The tokenizer without white space between JSON tokens. `None` if the checkpoint has none.
///
/// # Errors
/// If the file is not JSON, or not a tokenizer that this program can use. A model with it could not
/// be run on any text.
pub fn read(checkpoint: &dyn Checkpoint) -> Result<Option<Vec<u8>>> {
    let Some(bytes) = checkpoint.tokenizer()? else { return Ok(None) };
    let file = || format!("{}/{FILE}", checkpoint.place());
    if let Err(error) = serde_json::from_slice::<IgnoredAny>(&bytes) {
        return Err(LoadError::File { file: file(), problem: format!("not valid JSON: {error}") });
    }
    let bytes = without_limits(&compact(&bytes));
    if let Err(error) = Tokenizer::from_bytes(&bytes, Vec::new()) {
        let problem = format!(
            "{error}; repair the file, or move it away to convert the model without a tokenizer"
        );
        return Err(LoadError::File { file: checkpoint.place(), problem });
    }
    Ok(Some(bytes))
}

/// Drops white space outside strings. Numbers and strings stay as written.
fn compact(json: &[u8]) -> Vec<u8> {
    let mut strings = Strings::default();
    let mut keep = |byte: &u8| strings.inside(*byte) || !byte.is_ascii_whitespace();
    json.iter().copied().filter(|byte| keep(byte)).collect()
}

/// The keys as they occur in a compact object, with the character before them.
const KEYS: [&[u8]; 4] =
    [br#"{"truncation":"#, br#","truncation":"#, br#"{"padding":"#, br#","padding":"#];

/// Replaces the values of the outermost `truncation` and `padding` by `null`.
/// `json` is compact and valid.
fn without_limits(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let (mut strings, mut depth) = (Strings::default(), 0_usize);
    // Whether this is within a value that is left out.
    let mut skipping = false;
    for &byte in json {
        let quoted = strings.inside(byte);
        if !quoted {
            depth += usize::from(matches!(byte, b'{' | b'['));
            depth -= usize::from(matches!(byte, b'}' | b']'));
            let ends = depth == 1 && byte == b',' || depth == 0;
            skipping &= !ends;
        }
        if !skipping {
            out.push(byte);
        }
        let named = || KEYS.iter().any(|key| out.ends_with(key));
        if !quoted && byte == b':' && depth == 1 && !skipping && named() {
            out.extend_from_slice(b"null");
            skipping = true;
        }
    }
    out
}

/// Tracks which bytes of a JSON text are within a string.
#[derive(Default)]
struct Strings {
    quoted: bool,
    escaped: bool,
}

impl Strings {
    /// Whether the next byte belongs to a string, including its quotes.
    fn inside(&mut self, byte: u8) -> bool {
        let was = self.quoted;
        if self.quoted {
            self.quoted = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
        } else {
            self.quoted = byte == b'"';
        }
        was || self.quoted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_null_and_all_else_stays() {
        let file = br#"{ "version": "1.0", "truncation": { "max_length": 8, "a": [1, {}] },
            "padding": {"strategy":"BatchLongest", "pad": "x\\" },
            "model": { "truncation": 5, "padding": { "b": " , }" }, "vocab": { "\"truncation\":": 1 } } }"#;
        let kept = without_limits(&compact(file));
        let kept = String::from_utf8(kept).unwrap();
        assert_eq!(
            kept,
            r#"{"version":"1.0","truncation":null,"padding":null,"#.to_owned()
                + r#""model":{"truncation":5,"padding":{"b":" , }"},"vocab":{"\"truncation\":":1}}}"#
        );
        let last = without_limits(br#"{"a":1,"padding":{"b":2}}"#);
        assert_eq!(last, br#"{"a":1,"padding":null}"#);
        for plain in [&br#"{"truncation":null,"padding":null,"a":"truncation"}"#[..], b"{}", b"[]"]
        {
            assert_eq!(without_limits(plain), plain);
        }
    }
}
