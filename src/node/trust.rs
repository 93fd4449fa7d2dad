//! Whose models may be used: publishers' keys in `trusted.json` of the data directory.
//!
//! A removed publisher stays refused, under every policy, until it is added again.
//!
//! The file is authoritative: it is read for every decision and changed under a lock, so that the
//! running node and `doppler-node trust` see each other's changes at once. It is bounded and
//! replaced as a whole. A damaged file is an error, never an empty list.

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
/// Removed publishers remembered.
pub const REFUSED_MAX: usize = 4096;
/// Bytes of a note.
pub const NOTE_BYTES_MAX: usize = 128;
/// The largest file that is read. A full one is well below.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
const VERSION: u32 = 1;

/// What happens when a model of an untrusted publisher should be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum TrustPolicy {
    /// Ask at a terminal; without one, trust the publisher from its first use on. Either way the
    /// answer is kept
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
    /// The user's note, or the model that was first used.
    #[serde(default)]
    pub note: String,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    publishers: Vec<Trusted>,
    /// Removed, and not added again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    refused: Vec<PublicKey>,
}

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    pub trusted: Vec<Trusted>,
    /// Removed, and not added again.
    pub refused: Vec<PublicKey>,
}

impl Known {
    pub fn trusts(&self, publisher: PublicKey) -> bool {
        self.trusted.iter().any(|one| one.publisher == publisher)
    }
}

/// What follows from a model's signers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Allowed,
    /// It may be used, and this publisher becomes trusted.
    FirstUse(PublicKey),
    /// The owner must decide. `removed`: all its signers were removed.
    Refused {
        removed: bool,
    },
}

/// One trusted signer is enough, because all signed the same bytes. A refused signer does not
/// count.
fn judge(policy: TrustPolicy, known: &Known, signers: &[PublicKey], can_ask: bool) -> Verdict {
    if signers.iter().any(|key| known.trusts(*key)) {
        return Verdict::Allowed;
    }
    let first = signers.iter().find(|key| !known.refused.contains(key));
    match (policy, first) {
        (_, None) if !signers.is_empty() => Verdict::Refused { removed: true },
        (TrustPolicy::Any, _) => Verdict::Allowed,
        (TrustPolicy::FirstUse, Some(first)) if !can_ask => Verdict::FirstUse(*first),
        _ => Verdict::Refused { removed: false },
    }
}

/// A model was not used because nobody trusted signed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error(
    "model {name} ({model}) is signed by {}, who {}: \
     doppler-node trust add {}, or run it again with --trust {}",
    publishers.first().map_or("nobody", String::as_str),
    if *removed { "was removed from those trusted here" } else { "is not trusted here" },
    publishers.first().map_or("PUBLISHER", String::as_str),
    publishers.first().map_or("PUBLISHER", String::as_str)
)]
pub struct Untrusted {
    pub model: String,
    pub name: String,
    /// Public keys, hexadecimal.
    pub publishers: Vec<String>,
    /// They were removed: the owner is not asked about them again.
    #[serde(default)]
    pub removed: bool,
}

/// The publishers trusted in one data directory.
#[derive(Debug, Clone)]
pub struct TrustStore {
    path: PathBuf,
}

impl TrustStore {
    /// # Errors
    /// If the file exists but cannot be read or is invalid.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let store = Self { path: data.join("trusted.json") };
        store.read()?;
        Ok(store)
    }

    /// The trusted publishers, and the removed ones.
    pub fn read(&self) -> anyhow::Result<Known> {
        let path = self.path.display();
        let mut text = Vec::new();
        match regular::open(&self.path) {
            Ok(file) => file
                .take(FILE_BYTES_MAX + 1)
                .read_to_end(&mut text)
                .with_context(|| format!("cannot read {path}"))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Known::default());
            }
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
        let Stored { publishers: trusted, refused, .. } = stored;
        ensure!(
            trusted.len() <= TRUSTED_MAX && refused.len() <= REFUSED_MAX,
            damaged("too many publishers".into())
        );
        Ok(Known { trusted, refused })
    }

    /// Trusts these publishers and stops refusing them. True if any was new.
    pub fn add(&self, publishers: &[PublicKey], how: How, note: &str) -> anyhow::Result<bool> {
        ensure!(
            note.len() <= NOTE_BYTES_MAX && !note.chars().any(char::is_control),
            "a note is at most {NOTE_BYTES_MAX} bytes on one line"
        );
        self.change(|Known { trusted: all, refused }| {
            let before = all.len();
            refused.retain(|one| !publishers.contains(one));
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

    /// Stops trusting a publisher, and refuses it until it is added again. False if it was not
    /// trusted.
    pub fn remove(&self, publisher: PublicKey) -> anyhow::Result<bool> {
        self.change(|Known { trusted, refused }| {
            let before = trusted.len();
            trusted.retain(|one| one.publisher != publisher);
            if !refused.contains(&publisher) {
                ensure!(
                    refused.len() < REFUSED_MAX,
                    "{REFUSED_MAX} publishers are refused already: nothing was changed"
                );
                refused.push(publisher);
            }
            Ok(trusted.len() < before)
        })
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Known) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lock_path = self.path.with_extension("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.with_context(|| format!("cannot open {}", lock_path.display()))?;
        // Held for a few milliseconds at a time, and released when it is closed.
        lock.lock().with_context(|| format!("cannot lock {}", lock_path.display()))?;
        let before = self.read()?;
        let mut known = before.clone();
        let changed = change(&mut known)?;
        if known != before {
            let Known { trusted: publishers, refused } = known;
            let stored = Stored { version: VERSION, publishers, refused };
            write_private(&self.path, &serde_json::to_vec_pretty(&stored)?)?;
        }
        Ok(changed)
    }

    /// Whether a model signed by these publishers may be used. Under the first-use policy, the
    /// first signer that was not removed becomes trusted. With `can_ask`, a person decides about
    /// strangers.
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
        let Some(first) = self.check(policy, model, name, publishers, can_ask)? else {
            return Ok(());
        };
        tracing::info!(publisher = %first, model = name, "trusted from its first use on");
        let mut note: String = format!("first used: {name}");
        while note.len() > NOTE_BYTES_MAX {
            note.pop();
        }
        self.add(&[first], How::FirstUse, &note)?;
        Ok(())
    }

    /// As [`Self::admit`], but changes nothing. Returns the publisher that the use would make
    /// trusted.
    ///
    /// # Errors
    /// [`Untrusted`] if it may not be used.
    pub fn check(
        &self,
        policy: TrustPolicy,
        model: &str,
        name: &str,
        publishers: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<Option<PublicKey>> {
        match judge(policy, &self.read()?, publishers, can_ask) {
            Verdict::Allowed => Ok(None),
            Verdict::FirstUse(first) => Ok(Some(first)),
            Verdict::Refused { removed } => bail!(Untrusted {
                model: model.to_owned(),
                name: name.to_owned(),
                publishers: publishers.iter().map(PublicKey::to_string).collect(),
                removed,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl TrustStore {
        fn list(&self) -> anyhow::Result<Vec<Trusted>> {
            Ok(self.read()?.trusted)
        }
    }

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

    #[test]
    fn who_was_removed_is_refused_under_every_policy_until_added() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::open(dir.path()).unwrap();
        let admit = |policy, signers: &[PublicKey]| store.admit(policy, "id", "m", signers, false);
        store.admit(TrustPolicy::FirstUse, "id", "m", &[key(1)], false).unwrap();
        assert!(store.remove(key(1)).unwrap());
        let store = TrustStore::open(dir.path()).unwrap();
        for policy in [TrustPolicy::FirstUse, TrustPolicy::Listed, TrustPolicy::Any] {
            let error = admit(policy, &[key(1)]).unwrap_err();
            assert!(error.downcast_ref::<Untrusted>().unwrap().removed, "{policy:?}");
            assert!(error.to_string().contains("was removed"), "{error}");
        }
        assert_eq!(store.list().unwrap(), [], "being refused trusts nobody");
        // Another signer of the same bytes is judged separately.
        let first = store.check(TrustPolicy::FirstUse, "id", "m", &[key(1), key(2)], false);
        assert_eq!(first.unwrap(), Some(key(2)));
        assert_eq!(store.list().unwrap(), [], "a check changes nothing");
        // A publisher that was never trusted can be refused, too.
        assert!(!store.remove(key(3)).unwrap());
        assert!(admit(TrustPolicy::Any, &[key(3)]).is_err());
        store.add(&[key(1), key(3)], How::Added, "").unwrap();
        assert!(admit(TrustPolicy::Listed, &[key(1)]).is_ok());
        assert!(admit(TrustPolicy::Listed, &[key(3)]).is_ok());
        assert_eq!(store.read().unwrap().refused, []);
    }

    #[test]
    fn a_list_without_refusals_is_read_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            r#"{{"version":1,"publishers":[{{"publisher":"{}","how":"added","note":""}}]}}"#,
            key(1)
        );
        fs::write(dir.path().join("trusted.json"), text).unwrap();
        let known = TrustStore::open(dir.path()).unwrap().read().unwrap();
        assert!(known.trusts(key(1)) && known.refused.is_empty());
    }
}
