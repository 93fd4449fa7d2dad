//! The driver's compiled kernels, kept in a file between runs, so that it need not compile them
//! again.
//!
//! One file for each adapter model, in a directory that belongs to this user. A file is the BLAKE3
//! of the rest, then the data from wgpu ([`wgpu::PipelineCache::get_data`]: its own header, which
//! names adapter, driver and layout, then the driver's bytes). Any other content is ignored and
//! replaced. Files are written in full and then renamed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// The largest file that is read. A driver's bytes for all kernels are a few MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Where an adapter's file is.
pub(super) struct PipelineFile {
    path: PathBuf,
}

impl PipelineFile {
    /// `None` for an adapter whose driver does not give out its compiled kernels.
    pub fn of(dir: &Path, adapter: &wgpu::AdapterInfo) -> Option<Self> {
        let name = wgpu::util::pipeline_cache_key(adapter)?;
        Some(Self { path: dir.join(name) })
    }

    /// The kept data, if there is a complete and undamaged file.
    pub fn read(&self) -> Option<Vec<u8>> {
        let file = File::open(&self.path).ok()?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).ok()?;
        let (hash, data) = bytes.split_first_chunk::<{ blake3::OUT_LEN }>()?;
        let whole = bytes.len() as u64 <= FILE_BYTES_MAX && blake3::hash(data) == *hash;
        if !whole {
            tracing::warn!("{} is damaged: kernels are compiled again", self.path.display());
        }
        whole.then(|| data.to_vec())
    }

    /// Replaces the kept data by `data`.
    pub fn write(&self, data: &[u8]) -> io::Result<()> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
            builder.mode(0o700);
            options.mode(0o600);
        }
        builder.create(dir)?;
        // Two processes may write at once: each has its own temporary file, and the last one wins.
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let written = options.open(&temporary).and_then(|mut file| {
            file.write_all(blake3::hash(data).as_bytes())?;
            file.write_all(data)?;
            file.sync_all()
        });
        let kept = written.and_then(|()| fs::rename(&temporary, &self.path));
        if kept.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        kept
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_damage_is_as_good_as_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = PipelineFile { path: dir.path().join("deep/down/adapter") };
        assert!(file.read().is_none());
        file.write(b"first").unwrap();
        file.write(b"of the driver").unwrap();
        assert_eq!(file.read().unwrap(), b"of the driver");
        let bytes = fs::read(&file.path).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&file.path, &damaged).unwrap();
            assert!(file.read().is_none(), "byte {at}");
            fs::write(&file.path, &bytes[..at]).unwrap();
            assert!(file.read().is_none(), "cut to {at}");
        }
        let kept: Vec<_> = fs::read_dir(file.path.parent().unwrap()).unwrap().collect();
        assert_eq!(kept.len(), 1, "nothing temporary is left");
        let nowhere = PipelineFile { path: file.path.join("below a file") };
        assert!(nowhere.write(b"x").is_err() && nowhere.read().is_none());
    }
}
