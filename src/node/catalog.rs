//! The models that a node knows: their signers, and the manifest once it has arrived.
//!
//! The mesh decides who signed what: it verifies signatures and enforces bounds, and the catalogue
//! follows it. A manifest is added only if its bytes hash to the model's id, and is removed with
//! the last announcement of its model.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use doppler_store::manifest::Manifest;
use doppler_store::signature::SignedModel;
use doppler_store::{ModelId, ShardId};

/// One model.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Its announcements, one per publisher.
    pub signed: Vec<SignedModel>,
    pub manifest: Option<Arc<Manifest>>,
    /// Since when this run of the node knows it.
    pub since: Option<SystemTime>,
}

impl Known {
    /// The manifest's object and, once the manifest is here, those that it lists.
    fn names(&self, id: ModelId) -> Vec<ShardId> {
        let listed = self.manifest.as_ref().and_then(|manifest| objects(manifest).ok());
        listed.unwrap_or_default().into_iter().chain([id.manifest()]).collect()
    }
}

/// All models this node knows.
pub struct Catalog {
    models: Mutex<BTreeMap<ModelId, Known>>,
    changed: watch::Sender<u64>,
}

impl Default for Catalog {
    fn default() -> Self {
        Self { models: Mutex::default(), changed: watch::channel(0).0 }
    }
}

impl Catalog {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ModelId, Known>> {
        // A panic cannot leave anything in here half-changed.
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Takes over the current announcements. Models without any are removed. `announced` is called
    /// under the lock, so that an older list never follows a newer one. Returns the objects, manifests
    /// included, that only removed models name.
    pub fn follow(&self, announced: impl FnOnce() -> Vec<SignedModel>) -> Vec<ShardId> {
        let mut models = self.lock();
        let mut now: BTreeMap<ModelId, Vec<SignedModel>> = BTreeMap::new();
        for signed in announced() {
            now.entry(signed.model).or_default().push(signed);
        }
        let gone: Vec<(ModelId, Known)> =
            models.extract_if(.., |model, _| !now.contains_key(model)).collect();
        let mut changed = !gone.is_empty();
        for (model, signed) in now {
            let known = models.entry(model).or_default();
            changed |= known.signed != signed;
            known.signed = signed;
            known.since.get_or_insert_with(SystemTime::now);
        }
        let mut orphans: HashSet<ShardId> =
            gone.iter().flat_map(|(id, known)| known.names(*id)).collect();
        if !orphans.is_empty() {
            for object in models.iter().flat_map(|(id, known)| known.names(*id)) {
                orphans.remove(&object);
            }
        }
        drop(models);
        if changed {
            self.touch();
        }
        orphans.into_iter().collect()
    }

    /// Adds the manifest of an announced model. False if it is no longer announced.
    pub fn add_manifest(&self, id: ModelId, manifest: Arc<Manifest>) -> bool {
        let is_known = match self.lock().get_mut(&id) {
            Some(known) => {
                known.manifest = Some(manifest);
                true
            }
            None => false,
        };
        self.touch();
        is_known
    }

    pub fn list(&self) -> Vec<(ModelId, Known)> {
        self.lock().iter().map(|(id, known)| (*id, known.clone())).collect()
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn get(&self, id: ModelId) -> Option<Known> {
        self.lock().get(&id).cloned()
    }

    /// Notifies of changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// A model's objects in the order that every node derives from its manifest, and to which bitmaps
/// of holdings refer: shards, then the tokenizer if it has a hash.
pub fn objects(manifest: &Manifest) -> anyhow::Result<Vec<ShardId>> {
    Ok(sizes(manifest)?.into_iter().map(|(id, _)| id).collect())
}

/// The same objects with their sizes from the manifest, in bytes.
pub fn sizes(manifest: &Manifest) -> anyhow::Result<Vec<(ShardId, u64)>> {
    Ok(manifest.objects()?)
}

/// The shards' ids, in the manifest's order.
pub fn shard_ids(manifest: &Manifest) -> anyhow::Result<Vec<ShardId>> {
    manifest.shards.iter().map(|shard| Ok(shard.id()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_holds_what_is_announced_and_nothing_else() {
        let signed = |publisher: u8, model: &[u8]| {
            let name = format!("name {publisher}");
            SignedModel::sign(&[publisher; 32], ModelId::of(model), &name, 9).unwrap()
        };
        let manifest = Arc::new(Manifest::parse(crate::embedded::manifest()).unwrap());
        let catalog = Catalog::default();
        let (one, other) = (ModelId::of(b"m"), ModelId::of(b"n"));
        assert!(!catalog.add_manifest(one, manifest.clone()), "nobody announced it");
        let mut changes = catalog.changes();
        catalog.follow(|| vec![signed(1, b"m"), signed(1, b"n")]);
        assert!(catalog.add_manifest(one, manifest));
        changes.mark_unchanged();
        catalog.follow(|| vec![signed(1, b"m"), signed(1, b"n")]);
        assert!(!changes.has_changed().unwrap(), "nothing is new");
        // Another signer of the same bytes adds a name; the manifest stays.
        catalog.follow(|| vec![signed(1, b"m"), signed(2, b"m")]);
        let known = catalog.get(one).unwrap();
        assert_eq!((known.signed.len(), known.manifest.is_some()), (2, true));
        assert!(catalog.get(other).is_none() && changes.has_changed().unwrap());
        // What another model names, too, stays wanted.
        let embedded = catalog.get(one).unwrap().manifest.unwrap();
        catalog.follow(|| vec![signed(1, b"m"), signed(1, b"n")]);
        assert!(catalog.add_manifest(other, embedded.clone()));
        assert_eq!(catalog.follow(|| vec![signed(1, b"n")]), [one.manifest()]);
        let mut gone = catalog.follow(Vec::new);
        let mut all = objects(&embedded).unwrap();
        all.push(other.manifest());
        gone.sort();
        all.sort();
        assert_eq!(gone, all);
        assert_eq!(catalog.len(), 0);
    }
}
