//! What an interrupted pull has done already: lines of JSON in a file that only grows.
//!
//! A line is written after what it tells of. Nothing in it is trusted blindly: a piece's bytes are
//! compared with its hash at the next start, a shard with its own when it enters the store. A line
//! that was cut off ends the file. Invariant: a journal belongs to one choice of files and one way to
//! convert them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::HubError;
use doppler_store::ShardId;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// A piece of a file is here; its BLAKE3.
    Piece { file: usize, piece: usize, hash: String },
    /// A file's hash has covered so many pieces; its state.
    Hash { file: usize, pieces: usize, state: String },
    /// A piece's bytes are no longer needed.
    Gone { file: usize, piece: usize },
    /// A converted shard is durable.
    Shard { id: ShardId, size: u64 },
}

/// See the module.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens or makes it, and reads what it has.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(path: &Path) -> Result<(Self, Vec<Record>), HubError> {
        let io = HubError::io(path);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(&io)?;
        let (mut records, mut sound) = (Vec::new(), 0);
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).map_err(&io)? > 0 {
            let record =
                line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice(line).ok());
            let Some(record) = record else { break };
            records.push(record);
            sound += line.len() as u64;
            line.clear();
        }
        file.set_len(sound).map_err(&io)?;
        let mut file = file;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(sound)).map_err(&io)?;
        Ok((Self { path: path.to_owned(), file }, records))
    }

    pub fn add(&mut self, record: &Record) -> Result<(), HubError> {
        let mut line = serde_json::to_vec(record).unwrap_or_default();
        line.push(b'\n');
        self.file.write_all(&line).map_err(HubError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_ends_it_and_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let piece = |piece| Record::Piece { file: 1, piece, hash: "00".into() };
        let shard = Record::Shard { id: ShardId::of(b"x"), size: 1 };
        let (mut journal, records) = Journal::open(&path).unwrap();
        assert_eq!(records, []);
        journal.add(&piece(0)).unwrap();
        journal.add(&shard).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"piece\":{\"fi"].concat()).unwrap();
        let (mut journal, records) = Journal::open(&path).unwrap();
        assert_eq!(records, [piece(0), shard.clone()]);
        journal.add(&piece(1)).unwrap();
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().1, [piece(0), shard, piece(1)]);
    }
}
