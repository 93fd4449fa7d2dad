//! A node's log in its data directory, which `logs` reads: while the node runs, and after a crash.
//!
//! Owns `node.log` and `node.log.1`, one JSON object a line, [`FILE_BYTES_MAX`] bytes each at most.
//! Holds what the program logs at `info` and above, what `--log` asks for beyond that, and the node's
//! reports. Only the process that holds the data directory's lock writes: what is said before waits,
//! up to [`WAITING_MAX`] lines.
//! Invariant: nobody waits for it, and nothing depends on it. A line that cannot be written is lost.

mod entry;
mod layer;
mod read;
mod rotating;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

pub use entry::{Entry, Level};
pub use layer::layer;
pub use read::tail;
use rotating::Rotating;

use super::drain::Drain;

/// Bytes of each of the two files, at most.
pub const FILE_BYTES_MAX: u64 = 4 << 20;
/// Lines that are kept until the data directory is this process's own.
const WAITING_MAX: usize = 256;
/// How long the end of a node waits for its last lines.
const FLUSH_MAX: Duration = Duration::from_millis(500);
/// Where a report comes from.
const REPORTS: &str = "doppler_node";

/// Where the lines go.
enum Sink {
    /// Nowhere yet.
    Waiting(VecDeque<Vec<u8>>),
    File(Rotating),
}

static SINK: Mutex<Sink> = Mutex::new(Sink::Waiting(VecDeque::new()));
/// Set once this process keeps a log.
static LINES: OnceLock<Drain> = OnceLock::new();

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file that is written, and the one before it.
fn files(data: &Path) -> [PathBuf; 2] {
    ["node.log", "node.log.1"].map(|name| data.join(name))
}

/// This process keeps a log from now on.
fn begin() {
    LINES.get_or_init(|| Drain::new("journal", write));
}

fn write(line: &[u8], lost: u64) {
    let mut sink = sink();
    if lost > 0 {
        let said = format!("{lost} lines of the log are lost: there were too many at once");
        sink.take(&Entry::now(Level::Warn, REPORTS, said).line());
    }
    sink.take(line);
}

impl Sink {
    fn take(&mut self, line: &[u8]) {
        match self {
            Self::Waiting(lines) if lines.len() < WAITING_MAX => lines.push_back(line.to_vec()),
            Self::Waiting(_) => {}
            Self::File(file) => file.write(line),
        }
    }
}

/// Notes an entry, if this process keeps a log.
fn note(entry: &Entry) {
    if let Some(lines) = LINES.get() {
        lines.offer(entry.line());
    }
}

/// Notes what the node reports elsewhere: on standard output, or as its end.
pub fn report(level: Level, message: impl Into<String>) {
    if LINES.get().is_some() {
        note(&Entry::now(level, REPORTS, message.into()));
    }
}

/// The data directory is this process's own: what was noted, and what follows, goes to its files.
///
/// # Errors
/// If the file cannot be opened.
pub fn open(data: &Path) -> io::Result<()> {
    if LINES.get().is_none() {
        return Ok(());
    }
    let mut file = Rotating::open(files(data), FILE_BYTES_MAX)?;
    let mut sink = sink();
    if let Sink::Waiting(lines) = &*sink {
        lines.iter().for_each(|line| file.write(line));
    }
    *sink = Sink::File(file);
    Ok(())
}

/// Waits a moment until everything that was noted is written.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(FLUSH_MAX);
    }
}
