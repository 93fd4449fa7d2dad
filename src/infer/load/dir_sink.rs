//! Fills a model's directory, which stays hidden until it is complete.
//!
//! If the output does not exist, a hidden directory beside it is filled and then renamed. If the
//! output is an empty directory (perhaps a mount point, a link, or `.`), a hidden directory inside
//! it is filled and its files are moved out, the manifest last. Everything that can be refused is
//! refused before anything is computed. If the sink is dropped before the end, it removes what it
//! wrote. What a killed process left behind is recognised by a lock that nobody holds, and removed
//! by the next conversion.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::sink::ShardSink;
use super::{LoadError, Result, io_error};
use doppler_store::ShardId;

/// Locked for as long as the process that fills the directory lives.
const LOCK: &str = ".lock";
/// Lists the files that are about to be moved to an existing output, one per line.
const MOVING: &str = ".moving";
const MANIFEST: &str = "manifest.json";

/// Writes a model into a directory, syncing each file.
pub struct DirSink {
    out: PathBuf,
    /// Whether `out` existed before, as an empty directory.
    fills: bool,
    unfinished: PathBuf,
    lock: Option<File>,
    /// Directories created above `out`, outermost first.
    made: Vec<PathBuf>,
    /// Whether to leave the unfinished directory as it is.
    keep: bool,
}

impl DirSink {
    /// Creates the hidden directory, so that an output that cannot be written is refused at once.
    ///
    /// # Errors
    /// If something exists there that is not an empty directory, or no directory can be created
    /// there.
    pub fn new(out: &Path) -> Result<Self> {
        let taken = || LoadError::OutputExists(out.display().to_string());
        let fills = match fs::metadata(out) {
            Ok(found) if found.is_dir() => true,
            Ok(_) => return Err(taken()),
            // A dangling link, or no file name.
            Err(_) if out.symlink_metadata().is_ok() || out.file_name().is_none() => {
                return Err(taken());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(io_error(out)(error)),
        };
        let home = match out.parent() {
            _ if fills => out,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if home.is_dir() {
            sweep(home);
        }
        if fills && fs::read_dir(out).map_err(io_error(out))?.next().is_some() {
            return Err(taken());
        }
        let name = out.file_name().unwrap_or("model".as_ref()).to_string_lossy();
        let (process, unique) = (std::process::id(), rand::random::<u32>());
        let mut sink = Self {
            out: out.to_owned(),
            fills,
            unfinished: home.join(format!(".{name}.partial-{process}-{unique:08x}")),
            lock: None,
            made: Vec::new(),
            keep: false,
        };
        // From here on, dropping it removes what was created.
        sink.make(home)?;
        Ok(sink)
    }

    fn make(&mut self, home: &Path) -> Result<()> {
        let missing = home.ancestors().take_while(|dir| !dir.as_os_str().is_empty());
        self.made = missing.take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
        self.made.reverse();
        fs::create_dir_all(&self.unfinished).map_err(io_error(&self.unfinished))?;
        let lock = self.unfinished.join(LOCK);
        let file = File::create_new(&lock).map_err(io_error(&lock))?;
        // On a file system without locks, a killed process merely leaves more behind.
        let _ = file.try_lock();
        self.lock = Some(file);
        Ok(())
    }

    /// The hidden directory that is being filled.
    pub fn unfinished(&self) -> &Path {
        &self.unfinished
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.unfinished.join(name);
        let io = io_error(&path);
        let mut file = File::create_new(&path).map_err(&io)?;
        file.write_all(bytes).map_err(&io)?;
        file.sync_all().map_err(io)
    }

    /// Moves the files to the existing output. The manifest makes it a model.
    fn move_files(&self) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.unfinished)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if ![LOCK, MANIFEST].contains(&name.as_str()) {
                names.push(name);
            }
        }
        let list = self.unfinished.join(MOVING);
        fs::write(&list, names.join("\n"))?;
        File::open(&list)?.sync_all()?;
        names.push(MANIFEST.to_owned());
        for name in &names {
            fs::rename(self.unfinished.join(name), self.out.join(name))?;
        }
        fs::remove_dir_all(&self.unfinished)
    }

    fn rename(&mut self) -> io::Result<()> {
        self.lock = None;
        fs::remove_file(self.unfinished.join(LOCK))?;
        // An empty directory may have appeared there meanwhile. Anything else makes the rename
        // fail.
        let _ = fs::remove_dir(&self.out);
        fs::rename(&self.unfinished, &self.out)
    }
}

impl ShardSink for DirSink {
    fn shard(&mut self, filename: &str, _id: ShardId, bytes: Vec<u8>) -> Result<()> {
        self.write(filename, &bytes)
    }

    fn file(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.write(name, &bytes)
    }

    fn finish(&mut self, manifest: Vec<u8>) -> Result<()> {
        self.write(MANIFEST, &manifest)?;
        sync_dir(&self.unfinished)?;
        // Complete: from here on the work is kept whatever happens.
        self.keep = true;
        let moved = if self.fills { self.move_files() } else { self.rename() };
        moved.map_err(|source| {
            let (from, to) = (self.unfinished.display(), self.out.display());
            LoadError::Io { path: format!("the model in {from} cannot be moved to {to}"), source }
        })?;
        sync_dir(match self.out.parent() {
            _ if self.fills => &self.out,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        })
    }
}

impl Drop for DirSink {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let _ = fs::remove_dir_all(&self.unfinished);
        for dir in self.made.iter().rev() {
            // Fails if somebody else has put something there.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Removes what killed processes left in a directory. A directory that a living process fills is
/// locked.
fn sweep(home: &Path) {
    let Ok(entries) = fs::read_dir(home) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with('.') || !name.contains(".partial-") {
            continue;
        }
        let left = entry.path();
        match File::open(left.join(LOCK)) {
            Ok(lock) if lock.try_lock().is_ok() => {}
            Ok(_) => continue,
            Err(_) => {
                // Its process was killed before it had the lock, or it is not ours: removed if it
                // is empty.
                let _ = fs::remove_dir(&left);
                continue;
            }
        }
        if let Ok(moving) = fs::read_to_string(left.join(MOVING))
            && !home.join(MANIFEST).exists()
        {
            for name in moving.lines().filter(|name| !name.contains(['/', '\\'])) {
                let _ = fs::remove_file(home.join(name));
            }
        }
        let _ = fs::remove_dir_all(&left);
    }
}

/// Makes a directory's entries durable, if the system can.
fn sync_dir(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|dir| dir.sync_all()).map_err(io_error(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn fill(sink: &mut DirSink) {
        for name in ["shard_00000.bin", "shard_00001.bin"] {
            sink.shard(name, ShardId::of(b"x"), b"x".to_vec()).unwrap();
        }
        sink.file("tokenizer.json", b"{}".to_vec()).unwrap();
    }

    const MODEL: [&str; 4] = [MANIFEST, "shard_00000.bin", "shard_00001.bin", "tokenizer.json"];

    #[test]
    fn an_output_appears_whole_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("made/by/convert");
        let mut sink = DirSink::new(&out).unwrap();
        fill(&mut sink);
        drop(sink);
        assert_eq!(names(dir.path()), [] as [&str; 0], "nor the directories above it");
        let mut sink = DirSink::new(&out).unwrap();
        fill(&mut sink);
        assert!(!out.exists());
        sink.finish(b"{}".to_vec()).unwrap();
        drop(sink);
        assert_eq!(names(&out), MODEL);
        assert_eq!(names(out.parent().unwrap()), ["convert"]);
        assert!(matches!(DirSink::new(&out), Err(LoadError::OutputExists(_))));
    }

    #[cfg(unix)]
    #[test]
    fn an_empty_directory_is_filled_where_it_is_whatever_leads_there() {
        use std::os::unix::fs::{MetadataExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        fs::create_dir(&real).unwrap();
        let link = dir.path().join("link");
        symlink(&real, &link).unwrap();
        let inode = fs::metadata(&real).unwrap().ino();
        for out in [link, real.join("."), real.join("../real")] {
            let mut sink = DirSink::new(&out).unwrap();
            fill(&mut sink);
            drop(sink);
            assert_eq!(names(&real), [] as [&str; 0], "{}", out.display());
            let mut sink = DirSink::new(&out).unwrap();
            fill(&mut sink);
            assert!(!real.join(MANIFEST).exists());
            sink.finish(b"{}".to_vec()).unwrap();
            assert_eq!(names(&real), MODEL, "{}", out.display());
            assert_eq!(fs::metadata(&real).unwrap().ino(), inode, "never replaced");
            MODEL.iter().for_each(|name| fs::remove_file(real.join(name)).unwrap());
        }
        let nowhere = dir.path().join("dangling");
        symlink(dir.path().join("none"), &nowhere).unwrap();
        assert!(matches!(DirSink::new(&nowhere), Err(LoadError::OutputExists(_))));
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(DirSink::new(&dir.path().join("file")).is_err());
        assert!(DirSink::new(&dir.path().join("file/under")).is_err(), "before any work");
        assert!(DirSink::new(&dir.path().join("none/..")).is_err());
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_a_living_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let killed = dir.path().join(".other.partial-1-00000000");
        let early = dir.path().join(".early.partial-1-00000001");
        for left in [&killed, &early] {
            fs::create_dir(left).unwrap();
        }
        fs::write(killed.join(LOCK), b"").unwrap();
        fs::write(killed.join("shard_00000.bin"), b"half").unwrap();
        let mut living = DirSink::new(&dir.path().join("living")).unwrap();
        fill(&mut living);
        assert!(!killed.exists() && !early.exists());
        drop(DirSink::new(&dir.path().join("out")).unwrap());
        assert!(living.unfinished().exists());
        living.finish(b"{}".to_vec()).unwrap();
        assert_eq!(names(dir.path()), ["living"]);
    }

    #[test]
    fn files_that_were_being_moved_when_it_was_killed_go_too() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(".model.partial-1-00000000");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(LOCK), b"").unwrap();
        fs::write(left.join(MOVING), b"shard_00000.bin\nshard_00001.bin\n../../etc").unwrap();
        fs::write(left.join("shard_00001.bin"), b"x").unwrap();
        fs::write(dir.path().join("shard_00000.bin"), b"x").unwrap();
        let mut sink = DirSink::new(dir.path()).unwrap();
        fill(&mut sink);
        sink.finish(b"{}".to_vec()).unwrap();
        assert_eq!(names(dir.path()), MODEL);
    }
}
