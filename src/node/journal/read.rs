//! Reads a node's log, whether or not the node runs: its last entries, and those that follow.
//!
//! Ignores lines that are no entries: torn by a crash, or of a later version. Memory is bounded by the
//! entries that are asked for, of [`LINE_BYTES_MAX`] bytes each.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use doppler_store::regular;

use super::{Entry, Level, files};

/// The longest line that is read; the rest of a longer one is ignored.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// The last `count` entries of a node's log that are at least as serious as `level`, and who goes on
/// after them. `None` if there is no log.
///
/// # Errors
/// If a file cannot be read.
pub fn tail(data: &Path, level: Level, count: usize) -> io::Result<Option<(Vec<Entry>, Follower)>> {
    let [path, before] = files(data);
    let mut now = open(&path)?;
    let before = open(&before)?;
    if same(now.as_ref(), before.as_ref()) {
        // The files changed in between.
        now = open(&path)?;
    }
    if now.is_none() && before.is_none() {
        return Ok(None);
    }
    let mut last = VecDeque::new();
    let mut take = |entry| {
        if last.len() == count {
            last.pop_front();
        }
        if count > 0 {
            last.push_back(entry);
        }
    };
    if let Some(before) = before {
        Lines::of(before).entries(level, &mut take)?;
    }
    let mut lines = now.map(Lines::of);
    if let Some(lines) = &mut lines {
        lines.entries(level, &mut take)?;
    }
    Ok(Some((last.into(), Follower { path, level, lines })))
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match regular::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether two handles are of one file.
fn same(one: Option<&File>, other: Option<&File>) -> bool {
    let (Some(one), Some(other)) = (one, other) else { return false };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |file: &File| file.metadata().ok().map(|file| (file.dev(), file.ino()));
        id(one).is_some() && id(one) == id(other)
    }
    #[cfg(not(unix))]
    {
        let _ = (one, other);
        false
    }
}

/// A file that is read line by line as it grows.
struct Lines {
    file: BufReader<File>,
    /// The beginning of a line whose end is not written yet.
    begun: Vec<u8>,
    /// Whether that line is too long.
    is_long: bool,
}

impl Lines {
    fn of(file: File) -> Self {
        Self { file: BufReader::new(file), begun: Vec::new(), is_long: false }
    }

    /// Passes on the entries whose lines are whole by now.
    fn entries(&mut self, level: Level, take: &mut impl FnMut(Entry)) -> io::Result<()> {
        loop {
            let room = LINE_BYTES_MAX - self.begun.len() as u64;
            let read = Read::take(&mut self.file, room).read_until(b'\n', &mut self.begun)?;
            if self.begun.ends_with(b"\n") {
                let entry = serde_json::from_slice::<Entry>(&self.begun).ok();
                if let Some(entry) = entry.filter(|one| one.level <= level && !self.is_long) {
                    take(entry);
                }
                (self.begun, self.is_long) = (Vec::new(), false);
            } else if self.begun.len() as u64 == LINE_BYTES_MAX {
                self.begun.clear();
                self.is_long = true;
            } else if read == 0 {
                return Ok(());
            }
        }
    }
}

/// Goes on after the last entry that was read, over changes of files and restarts of the node.
pub struct Follower {
    path: PathBuf,
    level: Level,
    lines: Option<Lines>,
}

impl Follower {
    /// Passes on what was written since the last call.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn more(&mut self, mut take: impl FnMut(Entry)) -> io::Result<()> {
        // Looked at before the rest of the present file is read: after a change nothing more is
        // written to it.
        let next = open(&self.path)?;
        let has_changed = match (&next, &self.lines) {
            (Some(next), Some(lines)) => is_other(next, lines.file.get_ref()),
            (Some(_), None) => true,
            (None, _) => false,
        };
        if let Some(lines) = &mut self.lines {
            lines.entries(self.level, &mut take)?;
        }
        if has_changed && let Some(next) = next {
            let mut lines = Lines::of(next);
            lines.entries(self.level, &mut take)?;
            self.lines = Some(lines);
        }
        Ok(())
    }
}

/// Whether the file of that name is another one than is read.
fn is_other(next: &File, read: &File) -> bool {
    if cfg!(unix) {
        return !same(Some(next), Some(read));
    }
    let length = |file: &File| file.metadata().map_or(0, |file| file.len());
    length(next) < length(read)
}

#[cfg(test)]
mod tests {
    use super::super::rotating::Rotating;
    use super::*;

    fn entry(level: Level, number: usize) -> Entry {
        Entry::now(level, "t", format!("entry {number}"))
    }

    fn texts(entries: &[Entry]) -> Vec<String> {
        entries.iter().map(|entry| entry.message.clone()).collect()
    }

    #[test]
    fn the_last_entries_are_read_over_both_files_and_by_level() {
        let dir = tempfile::tempdir().unwrap();
        assert!(tail(dir.path(), Level::Trace, 5).unwrap().is_none());
        let mut log = Rotating::open(files(dir.path()), 600).unwrap();
        for number in 0..9 {
            let level = if number % 2 == 0 { Level::Warn } else { Level::Info };
            log.write(&entry(level, number).line());
        }
        assert!(files(dir.path()).iter().all(|path| path.exists()), "it has changed files");
        let read = |level, count| texts(&tail(dir.path(), level, count).unwrap().unwrap().0);
        assert_eq!(read(Level::Trace, 2), ["entry 7", "entry 8"]);
        let all = read(Level::Info, 100);
        assert!(all.len() > 6 && all.windows(2).all(|pair| pair[0] < pair[1]), "{all:?}");
        assert_eq!(read(Level::Warn, 2), ["entry 6", "entry 8"]);
        assert!(read(Level::Error, 5).is_empty() && read(Level::Trace, 0).is_empty());
    }

    #[test]
    fn lines_that_are_no_entries_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let whole = entry(Level::Warn, 1).line();
        let long = vec![b'x'; 3 * LINE_BYTES_MAX as usize];
        let torn = &whole[..whole.len() / 2];
        let parts: [&[u8]; 8] = [torn, b"\n", &whole, b"\xff\n{}\n", &long, b"\n", &whole, torn];
        std::fs::write(&files(dir.path())[0], parts.concat()).unwrap();
        let (entries, mut follower) = tail(dir.path(), Level::Trace, 9).unwrap().unwrap();
        assert_eq!(texts(&entries), ["entry 1", "entry 1"]);
        // The last line becomes whole.
        let rest = &whole[whole.len() / 2..];
        let mut file = std::fs::File::options().append(true).open(&files(dir.path())[0]).unwrap();
        std::io::Write::write_all(&mut file, rest).unwrap();
        let mut more = Vec::new();
        follower.more(|entry| more.push(entry)).unwrap();
        assert_eq!(texts(&more), ["entry 1"]);
    }

    #[test]
    fn a_follower_misses_and_repeats_nothing_when_files_change() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Rotating::open(files(dir.path()), 1000).unwrap();
        log.write(&entry(Level::Info, 0).line());
        let (_, mut follower) = tail(dir.path(), Level::Info, 0).unwrap().unwrap();
        let mut seen = Vec::new();
        for number in 1..100 {
            log.write(&entry(Level::Info, number).line());
            log.write(&entry(Level::Debug, number).line());
            if number % 3 == 0 {
                follower.more(|entry| seen.push(entry.message)).unwrap();
            }
        }
        let wanted: Vec<String> = (1..100).map(|number| format!("entry {number}")).collect();
        assert_eq!(seen, wanted);
    }
}
