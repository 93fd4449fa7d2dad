//! Opens regular files and nothing else.
//!
//! A file in a data directory or a model's directory may have been replaced by anything. Opening a
//! FIFO waits until another process opens its other end, and reading a device may never end. So
//! files are opened without waiting, and refused unless they are regular files.
//! Invariant: nothing here waits for another process.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// A name that belongs to something other than a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is {0}, not a file")]
pub struct NotAFile(&'static str);

/// Whether an operation failed because the name belongs to something other than a regular file.
pub fn is_not_a_file(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<NotAFile>())
}

/// What a type of file is called, with its article.
pub(super) fn describe(of: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if of.is_fifo() {
            return "a FIFO";
        }
        if of.is_socket() {
            return "a socket";
        }
        if of.is_char_device() || of.is_block_device() {
            return "a device";
        }
    }
    match (of.is_dir(), of.is_symlink()) {
        (true, _) => "a directory",
        (_, true) => "a link",
        _ => "something else",
    }
}

fn not_a_file(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, NotAFile(what))
}

/// Opens a regular file for reading. Follows links.
///
/// # Errors
/// As the system's, and [`NotAFile`] within an error for anything else than a file.
pub fn open(path: &Path) -> io::Result<File> {
    at_once(OpenOptions::new().read(true), Links::Followed)
        .open(path)
        .and_then(only_files)
        .map_err(|error| explain(error, fs::metadata(path)))
}

/// Opens a regular file of the store's own with other options. Follows no link, so that nothing
/// outside the data directory is written to.
pub(super) fn open_own(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    at_once(options, Links::Refused)
        .open(path)
        .and_then(only_files)
        .map_err(|error| explain(error, fs::symlink_metadata(path)))
}

fn only_files(file: File) -> io::Result<File> {
    let found = file.metadata()?.file_type();
    if found.is_file() { Ok(file) } else { Err(not_a_file(describe(found))) }
}

/// The system's own errors do not say that a name is a socket's, a link's, or a FIFO's that
/// nobody reads.
fn explain(error: io::Error, found: io::Result<fs::Metadata>) -> io::Error {
    match found {
        Ok(found) if !found.is_file() => not_a_file(describe(found.file_type())),
        _ => error,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Links {
    Followed,
    Refused,
}

#[cfg(unix)]
fn at_once(options: &mut OpenOptions, links: Links) -> &mut OpenOptions {
    use rustix::fs::OFlags;
    use std::os::unix::fs::OpenOptionsExt;
    let links = if links == Links::Refused { OFlags::NOFOLLOW } else { OFlags::empty() };
    options.custom_flags((OFlags::NONBLOCK | links).bits().cast_signed())
}

#[cfg(not(unix))]
fn at_once(options: &mut OpenOptions, _: Links) -> &mut OpenOptions {
    options
}

/// Opens a regular file to append to it and to read it, and creates it for its owner alone. Follows no
/// link.
///
/// # Errors
/// As [`open`], and for a link.
pub fn append_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    open_own(&mut options, path)
}

/// The contents of a regular file.
///
/// # Errors
/// As [`open`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// As [`read`], of a file that must be text.
///
/// # Errors
/// As [`open`], and if it is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    let text = String::from_utf8(read(path)?);
    text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

/// As [`read`]; nothing of a file that has more than `max` bytes.
pub(super) fn read_at_most(path: &Path, max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    open(path)?.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= max).then_some(bytes))
}

/// Whether a name belongs to a regular file, or to a link to one.
pub(super) fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "bytes").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read(&at(name)).unwrap(), b"bytes");
            assert!(is_file(&at(name)));
        }
        assert_eq!(read_text(&at("file")).unwrap(), "bytes");
        fs::write(at("no-text"), [0xff]).unwrap();
        assert_eq!(read_text(&at("no-text")).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_at_most(&at("file"), 5).unwrap().as_deref(), Some(&b"bytes"[..]));
        assert_eq!(read_at_most(&at("file"), 4).unwrap(), None);

        fs::create_dir(at("dir")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), mode).unwrap();
        let _listening = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::os::unix::fs::symlink(at("fifo"), at("to-fifo")).unwrap();
        let others =
            [("dir", "directory"), ("fifo", "FIFO"), ("socket", "socket"), ("to-fifo", "FIFO")];
        for (name, kind) in others.into_iter().map(|(name, kind)| (at(name), kind)) {
            let error = open(&name).unwrap_err();
            assert!(is_not_a_file(&error) && error.to_string().contains(kind), "{error}");
            let writing = open_own(OpenOptions::new().write(true), &name).unwrap_err();
            assert!(is_not_a_file(&writing), "{writing}");
            assert!(!is_file(&name));
        }
        // What is written to is no link either.
        let linked = open_own(OpenOptions::new().write(true), &at("link")).unwrap_err();
        assert!(is_not_a_file(&linked) && linked.to_string().contains("a link"), "{linked}");
        let device = read(Path::new("/dev/zero")).unwrap_err();
        assert!(is_not_a_file(&device), "{device}");
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        for name in ["nowhere", "dangling"] {
            let error = open(&at(name)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }
}
