//! The files that the log is written to: the present one, and the one before it.
//!
//! Refuses to open anything but regular files, and follows no link.
//! Invariant: each file holds `max` bytes at most, and an entry is never cut by a change of files. After
//! a write that failed half-way, the next entry begins on a line of its own.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use doppler_store::regular;

pub(super) struct Rotating {
    paths: [PathBuf; 2],
    max: u64,
    /// `None` if it could not be opened after a change.
    file: Option<File>,
    bytes: u64,
    /// Whether the file ends within a line.
    is_torn: bool,
}

impl Rotating {
    /// Goes on with the file at `paths[0]`, or begins it. `paths[1]` is the one before.
    ///
    /// # Errors
    /// If it cannot be opened, or something else has its name.
    pub fn open(paths: [PathBuf; 2], max: u64) -> io::Result<Self> {
        let mut file = regular::append_private(&paths[0])?;
        let bytes = file.metadata()?.len();
        let mut last = [b'\n'];
        if bytes > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        let is_torn = last != [b'\n'];
        Ok(Self { paths, max, file: Some(file), bytes, is_torn })
    }

    /// Writes a line, or loses it.
    pub fn write(&mut self, line: &[u8]) {
        let length = line.len() as u64 + u64::from(self.is_torn);
        if length > self.max {
            return;
        }
        if self.file.is_none() || self.bytes.saturating_add(length) > self.max {
            self.change();
        }
        let Some(file) = &mut self.file else { return };
        let mut whole = Vec::with_capacity(line.len() + 1);
        whole.extend(self.is_torn.then_some(b'\n'));
        whole.extend_from_slice(line);
        match file.write_all(&whole) {
            Ok(()) => {
                self.bytes += whole.len() as u64;
                self.is_torn = false;
            }
            Err(_) => {
                self.is_torn = true;
                self.bytes = file.metadata().map_or(self.max, |file| file.len());
            }
        }
    }

    /// Makes the present file the one before, and begins another.
    fn change(&mut self) {
        let [now, before] = &self.paths;
        // Whatever cannot be renamed, a directory for example, must not grow.
        let renamed = fs::rename(now, before);
        self.file = renamed.and_then(|()| regular::append_private(now)).ok();
        self.bytes =
            self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |f| f.len());
        self.is_torn = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::files;
    use super::*;

    fn text(path: &PathBuf) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn two_files_hold_the_last_lines_and_no_more_than_their_bound() {
        let dir = tempfile::tempdir().unwrap();
        let paths = files(dir.path());
        let mut log = Rotating::open(paths.clone(), 100).unwrap();
        let lines: Vec<String> =
            (0..50).map(|number| format!("line number {number:03}\n")).collect();
        for line in &lines {
            log.write(line.as_bytes());
            assert!(paths.iter().all(|path| text(path).len() <= 100));
        }
        let kept = text(&paths[1]) + &text(&paths[0]);
        assert!(lines.concat().ends_with(&kept) && kept.len() > 100, "{kept}");
        log.write("x".repeat(101).as_bytes());
        assert!(!(text(&paths[1]) + &text(&paths[0])).contains('x'), "longer than a file");
        // A further process goes on.
        drop(log);
        let before = text(&paths[0]);
        let mut log = Rotating::open(paths.clone(), 100).unwrap();
        log.write(b"next\n");
        assert_eq!(text(&paths[0]), before + "next\n");
    }

    #[test]
    fn a_torn_line_costs_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let paths = files(dir.path());
        fs::write(&paths[0], "whole\nto").unwrap();
        let mut log = Rotating::open(paths.clone(), 100).unwrap();
        log.write(b"next\n");
        log.write(b"last\n");
        assert_eq!(text(&paths[0]), "whole\nto\nnext\nlast\n");
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_reads_it_and_nothing_else_is_written_to() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let paths = files(dir.path());
        Rotating::open(paths.clone(), 100).unwrap().write(b"secret\n");
        assert_eq!(fs::metadata(&paths[0]).unwrap().permissions().mode() & 0o777, 0o600);
        let other = dir.path().join("other");
        fs::write(&other, "theirs").unwrap();
        fs::remove_file(&paths[0]).unwrap();
        std::os::unix::fs::symlink(&other, &paths[0]).unwrap();
        assert!(Rotating::open(paths, 100).is_err());
        assert_eq!(text(&other), "theirs");
    }
}
