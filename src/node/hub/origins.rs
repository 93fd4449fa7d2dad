//! Which of this store's models was pulled as what from the Hub: `hub.json` in the data directory.
//!
//! So a model that was pulled once is run again without the network. A damaged file is an empty one:
//! then the Hub is asked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::identity::write_private;
use doppler_store::{ModelId, regular};

/// The most origins that are remembered; the oldest go first.
const ORIGINS_MAX: usize = 1024;

/// A model that was pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub model: ModelId,
    pub name: String,
    /// Names the choice of files, their hashes, and how they were converted.
    pub key: String,
    pub commit: String,
    /// Counts up with each entry.
    pub number: u64,
}

/// By what was asked for.
type Origins = BTreeMap<String, Origin>;

fn file(data: &Path) -> PathBuf {
    data.join("hub.json")
}

fn read(data: &Path) -> Origins {
    let bytes = regular::read(&file(data)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// What was pulled under this name.
pub fn find(data: &Path, asked: &str) -> Option<Origin> {
    read(data).remove(asked)
}

/// Remembers what was pulled.
///
/// # Errors
/// If it cannot be written.
pub fn add(data: &Path, asked: &str, origin: Origin) -> anyhow::Result<()> {
    let mut origins = read(data);
    let number = origins.values().map(|origin| origin.number).max().unwrap_or(0) + 1;
    origins.insert(asked.to_owned(), Origin { number, ..origin });
    while origins.len() > ORIGINS_MAX {
        let oldest = origins.iter().min_by_key(|(_, origin)| origin.number);
        let Some(oldest) = oldest.map(|(asked, _)| asked.clone()) else { break };
        origins.remove(&oldest);
    }
    write_private(&file(data), &serde_json::to_vec_pretty(&origins)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_remembered_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let origin = |name: &str| Origin {
            model: ModelId::of(name.as_bytes()),
            name: name.to_owned(),
            key: "k".into(),
            commit: "c".into(),
            number: 0,
        };
        assert_eq!(find(dir.path(), "hf:a/b"), None);
        add(dir.path(), "hf:a/b", origin("one")).unwrap();
        add(dir.path(), "hf:a/b", origin("two")).unwrap();
        assert_eq!(find(dir.path(), "hf:a/b").unwrap().name, "two");
        let many = (0..ORIGINS_MAX as u64)
            .map(|n| (format!("hf:x/{n}"), Origin { number: 9 + n, ..origin("x") }));
        let many: Origins = many.chain([("hf:a/b".to_owned(), origin("two"))]).collect();
        std::fs::write(file(dir.path()), serde_json::to_vec(&many).unwrap()).unwrap();
        add(dir.path(), "hf:new/one", origin("new")).unwrap();
        assert_eq!(read(dir.path()).len(), ORIGINS_MAX);
        assert_eq!(find(dir.path(), "hf:a/b"), None, "the oldest");
        assert!(find(dir.path(), "hf:new/one").is_some());
        std::fs::write(file(dir.path()), b"{").unwrap();
        assert_eq!(find(dir.path(), "hf:new/one"), None);
    }
}
