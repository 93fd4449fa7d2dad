//! Models that were removed here: this node does not copy them again for the swarm's sake, until
//! they are used, pinned or published here once more.
//!
//! Owns `declined.json` in the data directory, a list of ids, the last one last. Bounded: beyond
//! [`DECLINED_MAX`] the oldest are forgotten. A damaged file costs a warning, and what it said.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::identity::write_private;
use doppler_store::{ModelId, regular};

/// Models remembered.
const DECLINED_MAX: usize = 4096;

/// What a data directory says, and what has changed since.
pub struct Declined {
    path: PathBuf,
    models: Mutex<Vec<ModelId>>,
}

impl Declined {
    pub fn load(data: &Path) -> Self {
        let path = data.join("declined.json");
        let models = match regular::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!("{}: {error}; not used", path.display());
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        Self { path, models: Mutex::new(models) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ModelId>> {
        // Nothing in here can be left half-changed by a panic.
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn has(&self, model: ModelId) -> bool {
        self.lock().contains(&model)
    }

    /// Declines a model from now on.
    ///
    /// # Errors
    /// If that cannot be written down. It holds until the node stops all the same.
    pub fn add(&self, model: ModelId) -> anyhow::Result<()> {
        let mut models = self.lock();
        models.retain(|other| *other != model);
        models.push(model);
        let over = models.len().saturating_sub(DECLINED_MAX);
        models.drain(..over);
        write_private(&self.path, &serde_json::to_vec(&*models)?)
    }

    /// Call when a model is wanted here.
    pub fn forget(&self, model: ModelId) {
        let mut models = self.lock();
        let before = models.len();
        models.retain(|other| *other != model);
        if models.len() < before {
            let written = serde_json::to_vec(&*models).map_err(anyhow::Error::from);
            if let Err(error) = written.and_then(|bytes| write_private(&self.path, &bytes)) {
                tracing::warn!("{}: {error:#}", self.path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_removed_is_declined_after_a_restart_until_it_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (ModelId::of(b"m"), ModelId::of(b"n"));
        let declined = Declined::load(dir.path());
        declined.add(one).unwrap();
        declined.add(other).unwrap();
        declined.add(one).unwrap();
        declined.forget(other);
        let again = Declined::load(dir.path());
        assert!(again.has(one) && !again.has(other));
        for index in 0..DECLINED_MAX as u64 {
            again.lock().push(ModelId::of(&index.to_le_bytes()));
        }
        again.add(other).unwrap();
        assert!(again.lock().len() == DECLINED_MAX && again.has(other) && !again.has(one));
        std::fs::write(dir.path().join("declined.json"), "[").unwrap();
        assert!(!Declined::load(dir.path()).has(other), "a damaged file says nothing");
    }
}
