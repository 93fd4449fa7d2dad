//! Announcements of the models that a node keeps, in `kept/ID.json` of its data directory.
//!
//! A model is kept once it was used or pinned here, or some of it was copied here because the swarm
//! had too few copies: who signed it, and under which names, is still
//! known when its publisher has gone and the node was restarted. A file of this node's own acts:
//! what is only heard of leaves none. What it says is verified again when it is read; a damaged
//! file costs a warning and that model's announcements. Bounded: `SIGNERS_MAX` a model.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};

use super::identity::write_private;
use doppler_store::signature::SignedModel;
use doppler_store::{ModelId, ShardId};

/// Announcements kept of one model.
const SIGNERS_MAX: usize = 16;
/// The longest file that is read: far above what is ever written.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// How long a model stays kept of which nothing has come yet.
pub const GRACE: Duration = Duration::from_secs(120);

fn dir(data: &Path) -> PathBuf {
    data.join("kept")
}

/// When the model's announcements were kept.
pub fn since(data: &Path, model: ModelId) -> Option<SystemTime> {
    std::fs::metadata(file(data, model)).and_then(|file| file.modified()).ok()
}

fn file(data: &Path, model: ModelId) -> PathBuf {
    dir(data).join(format!("{model}.json"))
}

/// The announcements kept of one model; none if there is no file.
///
/// # Errors
/// If there is one that makes no sense.
pub fn signed(data: &Path, model: ModelId) -> anyhow::Result<Vec<SignedModel>> {
    let path = file(data, model);
    let mut bytes = Vec::new();
    match File::open(&path) {
        Ok(file) => file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    ensure!(bytes.len() as u64 <= FILE_BYTES_MAX, "more than {FILE_BYTES_MAX} bytes");
    let signed: Vec<SignedModel> = serde_json::from_slice(&bytes)?;
    ensure!(signed.len() <= SIGNERS_MAX, "more than {SIGNERS_MAX} signers");
    for one in &signed {
        ensure!(one.model == model, "it speaks of another model, {}", one.model);
        one.verify()?;
    }
    Ok(signed)
}

/// Every model that is kept in a data directory, with its announcements.
pub fn load(data: &Path) -> Vec<(ModelId, Vec<SignedModel>)> {
    let Ok(entries) = std::fs::read_dir(dir(data)) else { return Vec::new() };
    let mut all = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let Some(model) = stem.and_then(|stem| stem.parse::<ModelId>().ok()) else { continue };
        match signed(data, model) {
            Ok(signed) => all.push((model, signed)),
            Err(error) => tracing::warn!("{}: {error:#}; not used", path.display()),
        }
    }
    all
}

/// Forgets that a model is kept.
///
/// # Errors
/// If there is a file that cannot be removed.
pub fn remove(data: &Path, model: ModelId) -> anyhow::Result<()> {
    let path = file(data, model);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn save(data: &Path, model: ModelId, signed: &[SignedModel]) -> anyhow::Result<()> {
    let dir = dir(data);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    write_private(&file(data, model), &serde_json::to_vec(signed)?)
}

/// One model that is kept.
struct Entry {
    signed: Vec<SignedModel>,
    since: Instant,
}

/// The models that a running node keeps, as they lie in its data directory.
pub struct Kept {
    data: PathBuf,
    models: Mutex<HashMap<ModelId, Entry>>,
}

impl Kept {
    pub fn new(data: &Path) -> Self {
        Self { data: data.to_owned(), models: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelId, Entry>> {
        // Nothing in here can be left half-changed by a panic.
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an earlier run kept; it counts as kept from now on.
    pub fn restore(&self, now: Instant) -> Vec<(ModelId, Vec<SignedModel>)> {
        let all = load(&self.data);
        let entry = |signed: &Vec<SignedModel>| Entry { signed: signed.clone(), since: now };
        self.lock().extend(all.iter().map(|(model, signed)| (*model, entry(signed))));
        all
    }

    /// Keeps a model under these announcements, the best known first; those that are new.
    ///
    /// # Errors
    /// If that cannot be written down. It is kept until the node stops all the same.
    pub fn keep(
        &self,
        now: Instant,
        model: ModelId,
        mut signed: Vec<SignedModel>,
    ) -> anyhow::Result<Vec<SignedModel>> {
        signed.truncate(SIGNERS_MAX);
        let before = self.lock().insert(model, Entry { signed: signed.clone(), since: now });
        let before = before.map(|entry| entry.signed).unwrap_or_default();
        if before != signed {
            save(&self.data, model, &signed)?;
        }
        signed.retain(|one| !before.contains(one));
        Ok(signed)
    }

    pub fn has(&self, model: ModelId) -> bool {
        self.lock().contains_key(&model)
    }

    /// Whether a publisher has signed a kept model anew.
    pub fn is_behind(&self, model: ModelId, now: &[SignedModel]) -> bool {
        let models = self.lock();
        let Some(entry) = models.get(&model) else { return false };
        let is_old = |kept: &SignedModel| {
            now.iter().any(|one| one.publisher == kept.publisher && one != kept)
        };
        entry.signed.iter().any(is_old)
    }

    /// Stops keeping a model.
    ///
    /// # Errors
    /// As [`remove`].
    pub fn release(&self, model: ModelId) -> anyhow::Result<()> {
        self.lock().remove(&model);
        remove(&self.data, model)
    }

    /// The models that have been kept for longer than [`GRACE`].
    pub fn settled(&self, now: Instant) -> Vec<ModelId> {
        let settled = |entry: &Entry| now.saturating_duration_since(entry.since) >= GRACE;
        self.lock().iter().filter(|(_, entry)| settled(entry)).map(|(model, _)| *model).collect()
    }
}

/// What is here of one object.
#[derive(Debug, Clone, Copy, Default)]
pub struct Here {
    pub bytes: u64,
    pub is_pinned: bool,
    /// It belongs to another model that this node published or keeps, too.
    pub is_anothers: bool,
}

/// Whether anything of a model is still here that makes it a kept one: a pin of its manifest, an
/// object that is here for its sake or a part of one, or some of every object. The manifest alone
/// is no reason, nor is a tokenizer that other models have, too.
pub fn is_here(model: ModelId, objects: &[ShardId], here: impl Fn(ShardId) -> Here) -> bool {
    let is_held = |object: &ShardId| here(*object).bytes > 0 || here(*object).is_pinned;
    here(model.manifest()).is_pinned
        || objects.iter().any(|object| is_held(object) && !here(*object).is_anothers)
        || !objects.is_empty() && objects.iter().all(is_held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(publisher: u8, model: ModelId) -> SignedModel {
        SignedModel::sign(&[publisher; 32], model, &format!("name {publisher}"), 9).unwrap()
    }

    #[test]
    fn what_is_kept_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (model, other) = (ModelId::of(b"m"), ModelId::of(b"n"));
        let now = Instant::now();
        let kept = Kept::new(dir.path());
        assert_eq!(kept.restore(now), []);
        let first = kept.keep(now, model, vec![by(1, model)]).unwrap();
        assert_eq!(first, [by(1, model)]);
        assert_eq!(kept.keep(now, model, vec![by(1, model)]).unwrap(), [], "nothing new");
        assert_eq!(
            kept.keep(now, model, vec![by(2, model), by(1, model)]).unwrap(),
            [by(2, model)]
        );
        kept.keep(now, other, vec![by(1, other)]).unwrap();
        assert!(!kept.is_behind(model, &[by(3, model)]) && !kept.is_behind(other, &[]));
        let renamed = SignedModel::sign(&[2; 32], model, "another name", 9).unwrap();
        assert!(kept.is_behind(model, &[renamed]), "its publisher has signed it anew");
        kept.release(other).unwrap();
        kept.release(other).unwrap();

        let again = Kept::new(dir.path());
        assert_eq!(again.restore(now), [(model, vec![by(2, model), by(1, model)])]);
        assert!(again.has(model) && !again.has(other));
        assert_eq!(again.settled(now), []);
        assert_eq!(again.settled(now + GRACE), [model]);
        let many: Vec<SignedModel> = (0..40).map(|publisher| by(publisher, model)).collect();
        again.keep(now, model, many.clone()).unwrap();
        assert_eq!(signed(dir.path(), model).unwrap(), many[..SIGNERS_MAX]);
    }

    #[test]
    fn a_damaged_or_forged_file_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let (model, other) = (ModelId::of(b"m"), ModelId::of(b"n"));
        let kept = Kept::new(dir.path());
        kept.keep(Instant::now(), model, vec![by(1, model)]).unwrap();
        let path = file(dir.path(), model);
        let sound = std::fs::read(&path).unwrap();
        let forged = serde_json::to_vec(&[SignedModel { name: "x".into(), ..by(1, model) }]);
        let elsewhere = serde_json::to_vec(&[by(1, other)]);
        for damaged in [
            sound[..sound.len() / 2].to_vec(),
            Vec::new(),
            vec![b' '; FILE_BYTES_MAX as usize + 1],
            forged.unwrap(),
            elsewhere.unwrap(),
        ] {
            std::fs::write(&path, damaged).unwrap();
            assert!(signed(dir.path(), model).is_err());
            assert_eq!(load(dir.path()), []);
        }
        std::fs::write(dir.path().join("kept/notes.txt"), "mine").unwrap();
        assert_eq!(load(dir.path()), []);
    }

    #[test]
    fn a_manifest_alone_is_no_reason_to_keep_a_model_unless_it_is_pinned() {
        let model = ModelId::of(b"m");
        let objects = [ShardId::of(b"a"), ShardId::of(b"b")];
        let only = |of: ShardId, it: Here| move |id| if id == of { it } else { Here::default() };
        let held = Here { bytes: 1, ..Here::default() };
        // A pin outlives the bytes that it pins.
        let pinned = Here { is_pinned: true, ..Here::default() };
        assert!(!is_here(model, &objects, only(model.manifest(), held)));
        assert!(is_here(model, &objects, only(model.manifest(), pinned)));
        assert!(is_here(model, &objects, only(objects[1], held)));
        assert!(is_here(model, &objects, only(objects[1], pinned)));
        assert!(!is_here(model, &objects, |_| Here::default()) && !is_here(model, &[], |_| held));
        // What another model has, too, is a reason only if nothing is missing.
        let shared = Here { is_anothers: true, ..held };
        assert!(!is_here(model, &objects, only(objects[1], shared)));
        assert!(is_here(model, &objects, |_| shared));
    }
}
