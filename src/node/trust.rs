//! Whose models may be used: publishers' keys in `trusted.json` of the data directory.
//!
//! The file is the truth: it is read at every question and changed under a lock, so that
//! the running node and `doppler-node trust` see each other's changes at once. Bounded,
//! replaced whole; a damaged file is an error, never an empty list.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::identity::write_private;
use doppler_store::regular;
use doppler_store::signature::PublicKey;

/// Publishers kept.
pub const TRUSTED_MAX: usize = 1024;
/// Bytes of a note.
pub const NOTE_BYTES_MAX: usize = 128;
/// Bytes of the file that are read; a full one is well below.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
const VERSION: u32 = 1;

/// What happens when a model of a publisher who is not trusted is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum TrustPolicy {
    /// Ask at a terminal; where there is none, trust the publisher from its first use on. Either
    /// way the answer is kept
    #[default]
    FirstUse,
    /// Refuse it until the publisher is added
    Listed,
    /// Use it without asking, and remember nothing
    Any,
}

/// How a publisher came to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// `trust add`, `--trust`, or a yes to the question.
    Added,
    /// Nobody could be asked, and the policy allows it.
    FirstUse,
}

/// A trusted publisher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trusted {
    pub publisher: PublicKey,
    pub how: How,
    /// Why, in its owner's words; or the model that was first used.
    #[serde(default)]
    pub note: String,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    publishers: Vec<Trusted>,
}

/// A model was not used because nobody trusted signed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error(
    "model {name} ({model}) is signed by {}, who is not trusted here: \
     doppler-node trust add {}, or run it again with --trust {}",
    publishers.first().map_or("nobody", String::as_str),
    publishers.first().map_or("PUBLISHER", String::as_str),
    publishers.first().map_or("PUBLISHER", String::as_str)
)]
pub struct Untrusted {
    pub model: String,
    pub name: String,
    /// Public keys, hexadecimal.
    pub publishers: Vec<String>,
}

/// The publishers trusted in one data directory.
#[derive(Debug, Clone)]
pub struct TrustStore {
    path: PathBuf,
}

impl TrustStore {
    /// # Errors
    /// If there is a file that cannot be read or makes no sense.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let store = Self { path: data.join("trusted.json") };
        store.list()?;
        Ok(store)
    }

    pub fn list(&self) -> anyhow::Result<Vec<Trusted>> {
        let path = self.path.display();
        let mut text = Vec::new();
        match regular::open(&self.path) {
            Ok(file) => file
                .take(FILE_BYTES_MAX + 1)
                .read_to_end(&mut text)
                .with_context(|| format!("cannot read {path}"))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {path}")),
        };
        let damaged = |why: String| {
            format!("{path} is damaged ({why}); restore it, or delete it to trust nobody")
        };
        ensure!(text.len() as u64 <= FILE_BYTES_MAX, damaged("it is too long".into()));
        let stored: Stored = match serde_json::from_slice(&text) {
            Ok(stored) => stored,
            Err(error) => bail!(damaged(error.to_string())),
        };
        ensure!(stored.version == VERSION, damaged(format!("version {}", stored.version)));
        ensure!(stored.publishers.len() <= TRUSTED_MAX, damaged("too many publishers".into()));
        Ok(stored.publishers)
    }

    /// Trusts these; true if any was new.
    pub fn add(&self, publishers: &[PublicKey], how: How, note: &str) -> anyhow::Result<bool> {
        ensure!(
            note.len() <= NOTE_BYTES_MAX && !note.chars().any(char::is_control),
            "a note is at most {NOTE_BYTES_MAX} bytes on one line"
        );
        self.change(|all| {
            let before = all.len();
            for publisher in publishers {
                if all.iter().any(|one| one.publisher == *publisher) {
                    continue;
                }
                ensure!(
                    all.len() < TRUSTED_MAX,
                    "{TRUSTED_MAX} publishers are trusted already: remove one first"
                );
                all.push(Trusted { publisher: *publisher, how, note: note.to_owned() });
            }
            Ok(all.len() > before)
        })
    }

    /// Stops trusting one; false if it was not trusted.
    pub fn remove(&self, publisher: PublicKey) -> anyhow::Result<bool> {
        self.change(|all| {
            let before = all.len();
            all.retain(|one| one.publisher != publisher);
            Ok(all.len() < before)
        })
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Trusted>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lock_path = self.path.with_extension("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.with_context(|| format!("cannot open {}", lock_path.display()))?;
        // Held for a few milliseconds by whoever has it; freed when it is closed.
        lock.lock().with_context(|| format!("cannot lock {}", lock_path.display()))?;
        let mut publishers = self.list()?;
        let changed = change(&mut publishers)?;
        if changed {
            let stored = Stored { version: VERSION, publishers };
            write_private(&self.path, &serde_json::to_vec_pretty(&stored)?)?;
        }
        Ok(changed)
    }

    /// Whether a model signed by these may be used: one trusted signer is enough, for all
    /// signed the same bytes. With `can_ask` a stranger is left to a person to decide.
    ///
    /// # Errors
    /// [`Untrusted`] if it may not.
    pub fn admit(
        &self,
        policy: TrustPolicy,
        model: &str,
        name: &str,
        publishers: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<()> {
        if policy == TrustPolicy::Any {
            return Ok(());
        }
        let trusted = self.list()?;
        if publishers.iter().any(|key| trusted.iter().any(|one| one.publisher == *key)) {
            return Ok(());
        }
        match publishers.first() {
            Some(first) if policy == TrustPolicy::FirstUse && !can_ask => {
                tracing::info!(publisher = %first, model = name, "trusted from its first use on");
                let mut note: String = format!("first used: {name}");
                while note.len() > NOTE_BYTES_MAX {
                    note.pop();
                }
                self.add(&[*first], How::FirstUse, &note)?;
                Ok(())
            }
            _ => bail!(Untrusted {
                model: model.to_owned(),
                name: name.to_owned(),
                publishers: publishers.iter().map(PublicKey::to_string).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::of_seed(&[byte; 32])
    }

    #[test]
    fn publishers_are_kept_once_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::open(dir.path()).unwrap();
        assert_eq!(store.list().unwrap(), []);
        assert!(store.add(&[key(1), key(2)], How::Added, "the lab").unwrap());
        assert!(!store.add(&[key(1)], How::FirstUse, "").unwrap());
        let again = TrustStore::open(dir.path()).unwrap().list().unwrap();
        assert_eq!((again.len(), again[0].how, again[0].note.as_str()), (2, How::Added, "the lab"));
        assert!(store.remove(key(1)).unwrap());
        assert!(!store.remove(key(1)).unwrap());
        assert_eq!(store.list().unwrap().len(), 1);
        assert!(store.add(&[key(3)], How::Added, "two\nlines").is_err());
        let many: Vec<PublicKey> = (0..=TRUSTED_MAX as u64)
            .map(|i| PublicKey([i.to_le_bytes(); 4].concat().try_into().unwrap()))
            .collect();
        let error = store.add(&many, How::Added, "").unwrap_err().to_string();
        assert!(error.contains("remove one first"), "{error}");
        assert_eq!(store.list().unwrap().len(), 1, "all or nothing");
    }

    #[test]
    fn a_damaged_file_is_an_error_not_an_empty_list() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::open(dir.path()).unwrap();
        store.add(&[key(1)], How::Added, "").unwrap();
        let path = dir.path().join("trusted.json");
        let sound = fs::read(&path).unwrap();
        for damaged in [
            &sound[..sound.len() / 2],
            b"",
            b"{\"version\": 9, \"publishers\": []}",
            b"{\"version\": 1, \"publishers\": [{\"publisher\": \"zz\", \"how\": \"added\"}]}",
        ] {
            fs::write(&path, damaged).unwrap();
            let error = TrustStore::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("trusted.json is damaged"), "{error}");
            assert!(store.add(&[key(2)], How::Added, "").is_err(), "nothing is written over it");
            assert_eq!(fs::read(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn policies_decide_over_strangers() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::open(dir.path()).unwrap();
        let admit = |policy, signers: &[PublicKey], can_ask| {
            store.admit(policy, "id", "model", signers, can_ask)
        };
        let refused = |result: anyhow::Result<()>| {
            result.unwrap_err().downcast::<Untrusted>().unwrap().publishers
        };
        assert!(admit(TrustPolicy::Any, &[key(1)], true).is_ok());
        assert_eq!(store.list().unwrap(), [], "any keeps nothing");
        let strangers = [key(1), key(2)];
        let names = strangers.map(|key| key.to_string());
        assert_eq!(refused(admit(TrustPolicy::Listed, &strangers, false)), names);
        assert_eq!(refused(admit(TrustPolicy::FirstUse, &strangers, true)), names);
        assert_eq!(refused(admit(TrustPolicy::FirstUse, &[], false)), [] as [&str; 0]);
        assert_eq!(store.list().unwrap(), [], "nothing is kept of what was refused");
        assert!(admit(TrustPolicy::FirstUse, &strangers, false).is_ok());
        let kept = store.list().unwrap();
        assert_eq!((kept.len(), kept[0].publisher, kept[0].how), (1, key(1), How::FirstUse));
        // One of several signers is enough, under every policy.
        assert!(admit(TrustPolicy::Listed, &[key(9), key(1)], false).is_ok());
    }
}
