//! The Hub's own cache on this disk, as huggingface_hub keeps it: read, never written.
//!
//! ```text
//! HF_HUB_CACHE/models--ORG--MODEL/refs/REVISION          the commit, as text
//! HF_HUB_CACHE/models--ORG--MODEL/snapshots/COMMIT/PATH  a link to ../../blobs/HASH, or a file
//! ```
//!
//! Invariant: a file of it is used only where its hash is checked afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use super::asked::Asked;
use super::listing::{Expected, Listing, RepoFile};
use doppler_store::regular;

/// The most files of a snapshot, and how deep they lie.
const FILES_MAX: usize = 4096;
const DEPTH_MAX: usize = 4;

/// Hugging Face's directory: `HF_HOME`, or `huggingface` in the user's cache directory.
pub fn home() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    set("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("huggingface")))
        .or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))
}

/// See the module.
pub struct LocalCache {
    dir: Option<PathBuf>,
}

impl LocalCache {
    pub fn of_environment() -> Self {
        let set = std::env::var_os("HF_HUB_CACHE").filter(|value| !value.is_empty());
        Self { dir: set.map(PathBuf::from).or_else(|| Some(home()?.join("hub"))) }
    }

    #[cfg(test)]
    pub const fn at(dir: Option<PathBuf>) -> Self {
        Self { dir }
    }

    fn repo(&self, repo: &str) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.join(format!("models--{}", repo.replace('/', "--"))))
    }

    fn snapshot(&self, repo: &str, commit: &str) -> Option<PathBuf> {
        Some(self.repo(repo)?.join("snapshots").join(commit))
    }

    /// A file of a listing, if the cache has one of its size.
    pub fn find(&self, listing: &Listing, file: &RepoFile) -> Option<PathBuf> {
        let path = self.snapshot(&listing.repo, &listing.commit)?.join(&file.path);
        let found = fs::metadata(&path).ok()?;
        (found.is_file() && found.len() == file.size).then_some(path)
    }

    /// What the cache has of a model, for when the Hub cannot be reached. Files whose hash is not
    /// known (they are no links to blobs) are left out.
    pub fn listing(&self, asked: &Asked) -> Option<Listing> {
        let revision = asked.revision();
        let named = regular::read_text(&self.repo(&asked.repo)?.join("refs").join(revision)).ok();
        let commit = named.map_or_else(|| revision.to_owned(), |text| text.trim().to_owned());
        // Anything else names no directory.
        Expected::parse(&commit)?;
        let snapshot = self.snapshot(&asked.repo, &commit)?;
        let mut files = Vec::new();
        walk(&snapshot, String::new(), DEPTH_MAX, &mut files);
        let repo = asked.repo.clone();
        (!files.is_empty()).then_some(Listing { repo, commit, files })
    }
}

fn walk(dir: &Path, within: String, depth: usize, files: &mut Vec<RepoFile>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (at, path) = (entry.path(), format!("{within}{name}"));
        let Ok(found) = fs::metadata(&at) else { continue };
        if found.is_dir() && depth > 0 {
            walk(&at, format!("{path}/"), depth - 1, files);
        } else if found.is_file() && files.len() < FILES_MAX {
            let blob = fs::read_link(&at).ok();
            let hash = blob.as_ref().and_then(|blob| Expected::parse(blob.file_name()?.to_str()?));
            files.extend(hash.map(|hash| RepoFile { path, size: found.len(), hash }));
        }
    }
}
