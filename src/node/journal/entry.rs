//! A line of the log: when, how serious, from where, what. Pure, except for [`Entry::now`].
//!
//! Invariant: an entry is one line, and its text has [`TEXT_BYTES_MAX`] bytes at most, whatever a
//! peer made the node say.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dates;

/// Bytes of an entry's message, and of its fields' values, together.
pub const TEXT_BYTES_MAX: usize = 4096;

/// How serious an entry is, the most serious first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something failed
    Error,
    /// Something that may need attention
    Warn,
    /// What the node does
    Info,
    /// For whoever looks for a fault
    Debug,
    /// All there is
    Trace,
}

impl From<tracing::Level> for Level {
    fn from(level: tracing::Level) -> Self {
        match level {
            tracing::Level::ERROR => Self::Error,
            tracing::Level::WARN => Self::Warn,
            tracing::Level::INFO => Self::Info,
            tracing::Level::DEBUG => Self::Debug,
            tracing::Level::TRACE => Self::Trace,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, in UTC, to the millisecond.
    pub time: String,
    pub level: Level,
    /// The module that says it.
    pub target: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

impl Entry {
    pub fn now(level: Level, target: &str, message: String) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = rfc3339(u64::try_from(since.as_millis()).unwrap_or(0));
        Self { time, level, target: target.to_owned(), message, fields: Map::new() }
    }

    /// The entry as a line of the file. A text that is too long is cut.
    pub fn line(&self) -> Vec<u8> {
        let mut room = TEXT_BYTES_MAX;
        let mut entry = self.clone();
        cut(&mut entry.message, &mut room);
        for value in entry.fields.values_mut() {
            if let Value::String(text) = value {
                cut(text, &mut room);
            }
        }
        let mut line = serde_json::to_vec(&entry).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// Cuts a text to the room that there is, and takes that room.
fn cut(text: &mut String, room: &mut usize) {
    if text.len() > *room {
        text.truncate(text.floor_char_boundary(*room));
        text.push('…');
        *room = 0;
    } else {
        *room -= text.len();
    }
}

/// One line for people. Characters that could steer a terminal are shown, not sent.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Error => "ERROR",
            Level::Warn => " WARN",
            Level::Info => " INFO",
            Level::Debug => "DEBUG",
            Level::Trace => "TRACE",
        };
        let text = plain(&self.message);
        write!(f, "{} {level} {}: {text}", plain(&self.time), plain(&self.target))?;
        for (name, value) in &self.fields {
            let value = match value {
                Value::String(text) => plain(text),
                other => plain(&other.to_string()),
            };
            write!(f, " {}={value}", plain(name))?;
        }
        Ok(())
    }
}

fn plain(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.chars().map(shown).collect()
}

/// A time in milliseconds since 1970, as RFC 3339 writes it.
fn rfc3339(ms: u64) -> String {
    format!("{}.{:03}Z", dates::rfc3339(ms / 1000), ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339_says() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_001, "2024-02-29T23:59:59.001Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }

    #[test]
    fn an_entry_is_one_bounded_line_whatever_it_says() {
        let mut entry = Entry::now(Level::Warn, "t", format!("a\nb\u{1b}[2J{}", "é".repeat(4000)));
        entry.fields.insert("peer".into(), "x".repeat(9000).into());
        entry.fields.insert("bytes".into(), 7.into());
        let line = entry.line();
        assert!(line.len() < 2 * TEXT_BYTES_MAX, "{}", line.len());
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let read: Entry = serde_json::from_slice(&line).unwrap();
        assert!(read.message.starts_with("a\nb") && read.message.ends_with('…'));
        assert_eq!((&read.fields["peer"], &read.fields["bytes"]), (&"…".into(), &7.into()));
        let shown = read.to_string();
        assert!(shown.contains(" WARN t: a\\nb\\u{1b}[2J") && !shown.contains('\n'), "{shown}");
        assert!(shown.ends_with("peer=… bytes=7"), "{shown}");
    }

    #[test]
    fn levels_are_ordered_by_how_serious_they_are() {
        assert!(Level::Error < Level::Warn && Level::Debug < Level::Trace);
        assert_eq!(Level::from(tracing::Level::INFO), Level::Info);
    }
}
