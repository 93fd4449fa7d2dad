//! The models a node knows: who signed them, and the manifest once it has arrived.
//!
//! Signatures were verified before anything enters; a manifest enters only if its
//! bytes hash to the model's id. Bounded: past `MODELS_MAX` new models are refused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use doppler_store::manifest::Manifest;
use doppler_store::signature::SignedModel;
use doppler_store::{ModelId, ShardId};

/// Models known at once; a swarm of flooders cannot take more memory than this.
const MODELS_MAX: usize = 256;
/// Publishers remembered for one model.
const PUBLISHERS_MAX: usize = 16;

/// One model.
#[derive(Debug, Clone)]
pub struct Known {
    /// Announcements of it, one a publisher.
    pub signed: Vec<SignedModel>,
    pub manifest: Option<Arc<Manifest>>,
}

impl Known {
    pub fn name(&self) -> &str {
        self.signed.first().map_or("", |signed| signed.name.as_str())
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
        // Nothing in here can be left half-changed by a panic.
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Remembers a verified announcement. True if the model's manifest is still wanted.
    pub fn announce(&self, signed: SignedModel) -> bool {
        let mut models = self.lock();
        if !models.contains_key(&signed.model) && models.len() >= MODELS_MAX {
            return false;
        }
        let known = models
            .entry(signed.model)
            .or_insert_with(|| Known { signed: Vec::new(), manifest: None });
        let publisher_known = known.signed.iter().any(|have| have.publisher == signed.publisher);
        if !publisher_known && known.signed.len() < PUBLISHERS_MAX {
            known.signed.push(signed);
        }
        let wanted = known.manifest.is_none();
        drop(models);
        self.touch();
        wanted
    }

    /// Adds the manifest of an announced model.
    pub fn add_manifest(&self, id: ModelId, manifest: Arc<Manifest>) {
        if let Some(known) = self.lock().get_mut(&id) {
            known.manifest = Some(manifest);
        }
        self.touch();
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

    /// Says when anything here has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// A model's objects in the order that every node derives from its manifest, which
/// bitmaps of holdings refer to: shards, then the tokenizer if it has an address.
pub fn objects(manifest: &Manifest) -> anyhow::Result<Vec<ShardId>> {
    Ok(sizes(manifest)?.into_iter().map(|(id, _)| id).collect())
}

/// The same objects with the sizes that the manifest gives them, bytes.
pub fn sizes(manifest: &Manifest) -> anyhow::Result<Vec<(ShardId, u64)>> {
    Ok(manifest.objects()?)
}

/// The shards' addresses, in the manifest's order.
pub fn shard_ids(manifest: &Manifest) -> anyhow::Result<Vec<ShardId>> {
    manifest.shards.iter().map(|shard| Ok(shard.id()?)).collect()
}
