//! Pins of models and of single objects, and the models that are known only by their pins.
//!
//! Pinning a model pins those of its objects that are here. The objects of a pinned model stay,
//! even if other models have them, too. A pin records the model's name and its objects, so a model
//! can be named, unpinned and removed even if its manifest is not here.

use std::collections::HashSet;
use std::path::Path;

use super::api::TargetReply;
use super::resolve::Candidate;
use super::storage::{StoredModel, Target, candidate, held, reply, stored_model};
use doppler_store::disk::{DiskTier, ModelPin};
use doppler_store::{ModelId, ShardId};

impl StoredModel {
    /// A model of which only its pin is known.
    fn of_pin(id: ModelId, pin: ModelPin) -> Self {
        let objects = pin.objects.into_iter().map(|(shard, size)| (shard, Some(size)));
        Self::with_objects(id, pin.name, objects.collect())
    }
}

/// Adds the models that pin something here and are not among `models` yet.
pub async fn add_pinned(disk: &DiskTier, models: &mut Vec<StoredModel>) {
    let known: HashSet<ModelId> = models.iter().map(|model| model.id).collect();
    for (id, pin) in disk.model_pins() {
        if known.contains(&id) {
            continue;
        }
        let stored = stored_model(disk, id).await;
        models.push(stored.unwrap_or_else(|| StoredModel::of_pin(id, pin)));
    }
}

/// As [`add_pinned`], with the names of those that no signer has named.
pub async fn add_pinned_and_names(
    disk: &DiskTier,
    data: &Path,
    models: &mut Vec<StoredModel>,
    named: &mut Vec<Candidate>,
) {
    let before = models.len();
    add_pinned(disk, models).await;
    for model in &models[before..] {
        if named.iter().all(|candidate| candidate.id != model.id) {
            named.push(candidate(data, model));
        }
    }
}

/// Pins those objects of a target that are here.
pub async fn pin(disk: &DiskTier, target: &Target) -> anyhow::Result<TargetReply> {
    let held = held(disk, target).await?;
    match target {
        Target::Model(model) => {
            let sizes = held.iter().map(|object| {
                let size = model.size_of(object.shard).unwrap_or(object.size);
                (object.shard, size)
            });
            disk.pin_model(model.id, model.name.clone(), sizes.collect()).await?;
        }
        Target::Object(_) => {
            for object in &held {
                disk.pin(object.shard).await?;
            }
        }
    }
    Ok(reply(target, &held))
}

/// Pins one object of a target, of `size` bytes.
pub async fn pin_one(
    disk: &DiskTier,
    target: &Target,
    shard: ShardId,
    size: u64,
) -> anyhow::Result<()> {
    match target {
        Target::Model(model) => {
            disk.pin_model(model.id, model.name.clone(), vec![(shard, size)]).await?;
        }
        Target::Object(_) => disk.pin(shard).await?,
    }
    Ok(())
}

/// Unpins what a model pins, or one object. `shared` counts the objects that stay pinned, by
/// another model or by a pin of their own.
pub async fn unpin(disk: &DiskTier, target: &Target) -> anyhow::Result<TargetReply> {
    let mut before = held(disk, target).await?;
    let mut released: HashSet<ShardId> = HashSet::new();
    match target {
        Target::Model(model) => released.extend(disk.unpin_model(model.id).await?.into_keys()),
        Target::Object(shard) => {
            if disk.is_pinned(*shard) {
                disk.unpin(*shard).await?;
                released.insert(*shard);
            }
        }
    }
    before.retain(|object| released.contains(&object.shard));
    let shared = released.iter().filter(|shard| disk.is_pinned(**shard)).count();
    Ok(TargetReply { shared, ..reply(target, &before) })
}
