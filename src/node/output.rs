//! What the program prints: results on standard output (`outln!`), remarks and the log on
//! standard error (`note!`, [`Log`]). Nothing else in this crate prints.
//!
//! Invariant: printing never panics. The first failure of standard output is kept, and later output
//! is dropped; `main` checks it at the end. Output that cannot be written to standard error is
//! lost, without further effect. Neither the log nor a node's reports are waited for.

use std::fmt;
use std::io::{self, IsTerminal, Stdout, Write};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::drain::Drain;

/// Prints a line on standard output.
macro_rules! outln {
    () => { $crate::output::print(format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// Prints a line on standard error.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::remark(format_args!("{}\n", format_args!($($text)*))) };
}

pub(crate) use {note, outln};

/// What became of standard output.
#[derive(Debug)]
pub enum Ended {
    /// Everything was written.
    Whole,
    /// Its reader went away, as `head` does, or only output that is not a result could not be
    /// written.
    Closed,
    /// It could not be written: a full disk.
    Failed(io::Error),
}

/// A stream that ends with its first failure.
struct Guarded<W> {
    stream: W,
    failed: Option<io::Error>,
    /// Whether the output that failed was not a result.
    excused: bool,
}

impl<W: Write> Guarded<W> {
    const fn new(stream: W) -> Self {
        Self { stream, failed: None, excused: false }
    }

    /// False once it has failed.
    fn attempt(&mut self, write: impl FnOnce(&mut W) -> io::Result<()>) -> bool {
        if self.failed.is_none() {
            self.failed = write(&mut self.stream).err();
        }
        self.failed.is_none()
    }

    fn finish(&mut self) -> Ended {
        self.attempt(W::flush);
        match &self.failed {
            None => Ended::Whole,
            Some(error) if self.excused || error.kind() == io::ErrorKind::BrokenPipe => {
                Ended::Closed
            }
            Some(error) => Ended::Failed(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

static OUT: LazyLock<Mutex<Guarded<Stdout>>> =
    LazyLock::new(|| Mutex::new(Guarded::new(io::stdout())));

fn out() -> MutexGuard<'static, Guarded<Stdout>> {
    OUT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints on standard output; whole lines are written at once. See `outln!`.
pub fn print(text: fmt::Arguments<'_>) {
    out().attempt(|stream| stream.write_fmt(text));
}

/// Prints a piece of text and flushes it. False once standard output has failed.
pub fn piece(text: &str) -> bool {
    out().attempt(|stream| stream.write_all(text.as_bytes()).and_then(|()| stream.flush()))
}

/// How long a process waits at its end for the log and the reports to be written.
const FLUSH_MAX: Duration = Duration::from_millis(500);

static REPORTS: OnceLock<Drain> = OnceLock::new();
static LOG: OnceLock<Drain> = OnceLock::new();

/// Prints a line that is not a result: a running node's report. Losing it is not a failure.
pub fn report(line: &str) {
    let write = |line: &[u8], _lost| {
        let mut out = out();
        if !out.attempt(|stream| stream.write_all(line).and_then(|()| stream.flush())) {
            out.excused = true;
        }
    };
    REPORTS.get_or_init(|| Drain::new("reports", write)).offer(format!("{line}\n").into_bytes());
}

fn is_written(drain: &OnceLock<Drain>) -> bool {
    drain.get().is_none_or(|drain| drain.flush(FLUSH_MAX))
}

/// Flushes, and returns what became of standard output.
pub fn finish() -> Ended {
    let _ = is_written(&LOG);
    // Reports that nobody reads are dropped. Their thread holds standard output.
    if is_written(&REPORTS) { out().finish() } else { Ended::Closed }
}

/// Prints on standard error, behind the log; both may fail. See `note!`.
pub fn remark(text: fmt::Arguments<'_>) {
    // If nobody reads the log, its thread holds standard error.
    if is_written(&LOG) {
        // One call for the whole text, so that lines of several threads do not mix.
        let _ = io::stderr().lock().write_all(text.to_string().as_bytes());
    }
}

/// Whether text on this stream may be coloured: it is a terminal, and the user has not disabled
/// colours (<https://no-color.org>).
pub fn colours(stream: &impl IsTerminal) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !refused && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// The log's destination: standard error. A line that cannot be written is lost, without further
/// effect.
pub struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let write = |line: &[u8], lost| {
            let mut stream = io::stderr().lock();
            if lost > 0 {
                let _ = writeln!(stream, "{lost} lines of the log are lost: nobody read it");
            }
            let _ = stream.write_all(line);
        };
        LOG.get_or_init(|| Drain::new("log", write)).offer(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accepts some bytes, then fails.
    struct Full {
        room: usize,
        kind: io::ErrorKind,
        taken: Vec<u8>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.taken.len() + bytes.len() > self.room {
                return Err(self.kind.into());
            }
            self.taken.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(room: usize, kind: io::ErrorKind) -> (Guarded<Full>, Vec<bool>) {
        let mut out = Guarded::new(Full { room, kind, taken: Vec::new() });
        let each = ["one ", "two ", "three ", "x"];
        let took = each.map(|text| out.attempt(|stream| stream.write_all(text.as_bytes())));
        (out, took.to_vec())
    }

    #[test]
    fn the_first_failure_is_kept_and_the_rest_dropped() {
        let (mut out, took) = written(8, io::ErrorKind::StorageFull);
        assert_eq!(took, [true, true, false, false], "the last one would have fitted");
        assert_eq!(out.stream.taken, b"one two ");
        assert!(matches!(out.finish(), Ended::Failed(e) if e.kind() == io::ErrorKind::StorageFull));
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let (mut out, _) = written(0, io::ErrorKind::BrokenPipe);
        assert!(matches!(out.finish(), Ended::Closed));
        let (mut out, took) = written(100, io::ErrorKind::BrokenPipe);
        assert!(matches!(out.finish(), Ended::Whole) && took.iter().all(|took| *took));
    }
}
