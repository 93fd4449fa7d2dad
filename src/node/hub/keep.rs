//! Takes a converted model into the store: through the node that runs on the data directory, which
//! announces it, or by itself if none does. Then the next node that starts there announces it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};

use crate::api::{ModelInfo, PublishReply, PublishRequest, Status};
use crate::catalog::sizes;
use crate::client::Client;
use crate::declined::Declined;
use crate::{identity, storage};
use doppler_store::disk::{DiskOptions, DiskTier, object_path};
use doppler_store::manifest::Manifest;
use doppler_store::signature::{PublicKey, SignedModel};
use doppler_store::{ModelId, Replicas, StoreError, regular};

/// Bytes that the running node's store could still pin. `None` if no node runs.
///
/// # Errors
/// If a node runs and does not answer.
pub fn room(data: &Path) -> anyhow::Result<Option<u64>> {
    let Some(node) = Client::find(data)? else { return Ok(None) };
    let status: Status = node.get("/control/v1/status")?;
    Ok(Some(status.disk.budget.saturating_sub(status.store.pinned_bytes)))
}

/// Whether a model of the store can be run without pulling it: the running node knows it, or all of
/// it is here.
pub fn is_here(data: &Path, model: ModelId) -> bool {
    if let Ok(Some(node)) = Client::find(data) {
        let known = node.get::<Vec<ModelInfo>>("/control/v1/models").unwrap_or_default();
        return known.iter().any(|known| known.id == model.to_string());
    }
    let Ok(bytes) = regular::read(&object_path(data, model.manifest())) else { return false };
    let objects = Manifest::parse(&bytes).ok().and_then(|manifest| sizes(&manifest).ok());
    let is_whole = |shard, size| {
        std::fs::metadata(object_path(data, shard)).is_ok_and(|found| found.len() == size)
    };
    objects.is_some_and(|objects| objects.into_iter().all(|(shard, size)| is_whole(shard, size)))
}

/// Takes the model in `dir` over, signed and pinned.
///
/// # Errors
/// If the store has no room, or belongs to a process that takes no commands.
pub fn keep(data: &Path, dir: &Path, replicas: Replicas) -> anyhow::Result<PublishReply> {
    match DiskTier::open(data, DiskOptions { budget: u64::MAX }) {
        Ok(disk) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(alone(&disk, data, dir, replicas))
        }
        Err(locked @ StoreError::Locked { .. }) => match Client::find(data)? {
            Some(node) => {
                let dir = std::path::absolute(dir)?;
                let request = PublishRequest { dir, shards: None, replicas, progress: true };
                node.work("/control/v1/publish", &request, |_| ())
            }
            None => bail!("{locked}; that process takes no commands"),
        },
        Err(error) => Err(error.into()),
    }
}

/// As a node's `publish`, without a swarm.
async fn alone(
    disk: &DiskTier,
    data: &Path,
    dir: &Path,
    replicas: Replicas,
) -> anyhow::Result<PublishReply> {
    let path = dir.join("manifest.json");
    let bytes = regular::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest = Manifest::parse(&bytes).with_context(|| path.display().to_string())?;
    let (model, name, size) = (ModelId::of(&bytes), manifest.model_id.clone(), bytes.len() as u64);
    let files = manifest.shards.iter().map(|shard| shard.filename.clone());
    let files = files.chain(manifest.tokenizer.iter().map(|tokenizer| tokenizer.file.clone()));
    let mut pinned = vec![(model.manifest(), size)];
    pinned.extend(sizes(&manifest)?);
    let _hold = disk.hold(pinned.iter().map(|(shard, _)| *shard));
    let mut copied = 0;
    for (file, (shard, size)) in files.zip(pinned.iter().skip(1)) {
        let imported = disk.import(dir.join(file), *shard, false).await?;
        if imported.how == Some(doppler_store::disk::ImportMethod::Copied) {
            copied += size;
        }
    }
    disk.put(bytes.into(), false).await?;
    let bytes_stored = pinned.iter().skip(1).map(|(_, size)| size).sum();
    let shards_stored = manifest.shards.len();
    disk.pin_model(model, name.clone(), pinned).await?;
    let seed = identity::load_or_create(data)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(0);
    let signed = SignedModel::sign_at(&seed, model, &name, size, replicas, now)?;
    let file = storage::published_file(data, model);
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    identity::write_private(&file, &serde_json::to_vec(&signed)?)?;
    Declined::load(data).forget(model);
    Ok(PublishReply {
        model: model.to_string(),
        name,
        publisher: PublicKey::of_seed(&seed).to_string(),
        shards_stored,
        bytes_stored,
        bytes_copied: copied,
    })
}
