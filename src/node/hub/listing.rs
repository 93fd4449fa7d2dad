//! What a repository of the Hub contains at one commit.
//!
//! API: `GET /api/models/REPO/revision/REV`, `GET /api/models/REPO/tree/COMMIT?recursive=true`,
//! `GET /api/models/REPO/refs`, `GET /REPO/resolve/COMMIT/PATH`. A file's hash is the SHA-256 of its
//! LFS entry, otherwise that of its Git blob.

use std::fmt;

use serde::Deserialize;

use super::asked::Asked;
use super::client::{self, Client, Failed};
use super::error::HubError;

/// The most files of a repository, and pages of its listing.
const FILES_MAX: usize = 32 * 1024;
const PAGES_MAX: usize = 64;
/// Revisions that an error lists.
const LISTED_MAX: usize = 12;

/// The hash that a file must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Sha256([u8; 32]),
    /// SHA-1 of `blob SIZE\0` and the bytes.
    GitBlob([u8; 20]),
}

impl Expected {
    /// A hash by its digits: 64 are a SHA-256, 40 a Git blob's.
    pub fn parse(digits: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if !digits.is_ascii() || digits.len() > 64 {
            return None;
        }
        for (at, byte) in bytes.iter_mut().take(digits.len() / 2).enumerate() {
            *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        match digits.len() {
            64 => Some(Self::Sha256(bytes)),
            40 => bytes.first_chunk().copied().map(Self::GitBlob),
            _ => None,
        }
    }

    pub const fn algorithm(self) -> &'static str {
        match self {
            Self::Sha256(_) => "SHA-256",
            Self::GitBlob(_) => "Git SHA-1",
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: &[u8] = match self {
            Self::Sha256(bytes) => bytes,
            Self::GitBlob(bytes) => bytes,
        };
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoFile {
    /// With slashes, within the repository.
    pub path: String,
    /// Bytes.
    pub size: u64,
    pub hash: Expected,
}

/// A repository at one commit.
#[derive(Debug, Clone)]
pub struct Listing {
    /// `ORG/MODEL` as the Hub writes it.
    pub repo: String,
    pub commit: String,
    pub files: Vec<RepoFile>,
}

#[derive(Deserialize)]
struct Info {
    id: String,
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Listing {
    /// # Errors
    /// If there is no such model or revision, it may not be read, or the Hub is not reached.
    pub fn fetch(client: &Client, asked: &Asked) -> Result<Self, HubError> {
        let (repo, revision) = (&asked.repo, asked.revision());
        let path = format!("/api/models/{repo}/revision/{}", encode(revision));
        let info: Result<(Info, _), _> = client.json(&path);
        let (info, _) = info.map_err(|failed| explain(client, repo, Some(revision), failed))?;
        if Expected::parse(&info.sha).is_none() || Asked::parse(&format!("hf:{}", info.id)).is_err()
        {
            return Err(client::answer(client.endpoint(), "its answer names no model and commit"));
        }
        let mut listing = Self { repo: info.id, commit: info.sha, files: Vec::new() };
        let mut page =
            Some(format!("/api/models/{}/tree/{}?recursive=true", listing.repo, listing.commit));
        for _ in 0..PAGES_MAX {
            let Some(path) = page.take() else { break };
            let entries: Result<(Vec<Entry>, _), _> = client.json(&path);
            let (entries, next) = entries.map_err(|failed| explain(client, repo, None, failed))?;
            listing.files.extend(entries.into_iter().filter_map(file));
            page = next;
        }
        if page.is_some() || listing.files.len() > FILES_MAX {
            let problem = format!("{} has more than {FILES_MAX} files", listing.repo);
            return Err(client::answer(client.endpoint(), &problem));
        }
        Ok(listing)
    }

    pub fn find(&self, path: &str) -> Option<&RepoFile> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Where a file is fetched.
    pub fn url(&self, client: &Client, path: &str) -> String {
        let path: Vec<String> = path.split('/').map(encode).collect();
        format!("{}/{}/resolve/{}/{}", client.endpoint(), self.repo, self.commit, path.join("/"))
    }
}

/// `None` for directories, and for paths that do not stay in the repository.
fn file(entry: Entry) -> Option<RepoFile> {
    let is_plain = |part: &str| !part.is_empty() && !part.starts_with("..") && part != ".";
    let path = entry.path;
    if entry.kind != "file" || path.contains(['\\', ':', '\0']) || !path.split('/').all(is_plain) {
        return None;
    }
    let (size, hash) = match entry.lfs {
        Some(lfs) => (lfs.size, Expected::parse(lfs.oid.trim_start_matches("sha256:"))?),
        None => (entry.size, Expected::parse(&entry.oid)?),
    };
    Some(RepoFile { path, size, hash })
}

/// Percent-encodes one part of a URL's path.
fn encode(part: &str) -> String {
    let mut out = String::new();
    for byte in part.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// The error for a refused request about a repository, or a file of it.
pub fn explain(client: &Client, repo: &str, revision: Option<&str>, failed: Failed) -> HubError {
    let (status, url, code) = match failed {
        Failed::Again { error, .. } | Failed::Final(error) => return error,
        Failed::Refused { status, url, code } => (status.as_u16(), url, code),
    };
    let page = format!("{}/{repo}", client.endpoint());
    let token = match client.has_token() {
        true => "the token in HF_TOKEN does not give access to it",
        false => "no token is set",
    };
    match (status, code.as_str()) {
        (401 | 403, "GatedRepo") => HubError::Access(format!(
            "{repo} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that \
             account ({token})"
        )),
        (401, _) => HubError::Access(format!(
            "{repo}: there is no such model, or it is private; if it is yours, set HF_TOKEN to a \
             token that may read it ({token})"
        )),
        (403, _) => HubError::Access(format!(
            "{repo} may not be read: see {page} for what it wants ({token})"
        )),
        (404, "RevisionNotFound") => HubError::Missing(format!(
            "{repo} has no revision {:?}{}",
            revision.unwrap_or_default(),
            revisions(client, repo)
        )),
        (404, "EntryNotFound") => {
            HubError::Missing(format!("{repo}: a file that the Hub lists is not there any more"))
        }
        (404 | 410, _) => HubError::Missing(format!(
            "{repo}: there is no such model at {}; see what there is at {}/models?search={}",
            client.endpoint(),
            client.endpoint(),
            encode(repo.rsplit('/').next().unwrap_or(repo)),
        )),
        _ => client::answer(&url, &format!("it answers {status}")),
    }
}

/// A repository's branches and tags, for an error.
fn revisions(client: &Client, repo: &str) -> String {
    #[derive(Deserialize)]
    struct Refs {
        #[serde(default)]
        branches: Vec<Ref>,
        #[serde(default)]
        tags: Vec<Ref>,
    }
    #[derive(Deserialize)]
    struct Ref {
        name: String,
    }
    let refs: Result<(Refs, _), _> = client.json(&format!("/api/models/{repo}/refs"));
    let Ok((refs, _)) = refs else { return String::new() };
    let names = refs.branches.into_iter().chain(refs.tags).map(|one| one.name);
    let names: Vec<String> = names.take(LISTED_MAX).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!(" (there are {})", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_told_by_their_length() {
        let sha = "a5".repeat(32);
        assert_eq!(Expected::parse(&sha), Some(Expected::Sha256([0xa5; 32])));
        assert_eq!(Expected::parse(&sha).unwrap().to_string(), sha);
        assert_eq!(Expected::parse(&"0f".repeat(20)), Some(Expected::GitBlob([0x0f; 20])));
        for bad in ["", "0f", &"xy".repeat(20), &"é".repeat(20), &"00".repeat(33)] {
            assert_eq!(Expected::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_files_that_stay_in_the_repository_are_listed() {
        let entry = |kind: &str, path: &str| {
            file(Entry {
                kind: kind.to_owned(),
                path: path.to_owned(),
                size: 3,
                oid: "00".repeat(20),
                lfs: None,
            })
        };
        assert!(entry("file", "a/b.json").is_some());
        for path in ["../a", "a/../b", "/etc/x", "a//b", "a\\b", "c:x", "./a"] {
            assert!(entry("file", path).is_none(), "{path}");
        }
        assert!(entry("directory", "a").is_none());
        assert_eq!(encode("a b/ü"), "a%20b%2F%C3%BC");
    }
}
