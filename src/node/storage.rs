//! Operations on what is stored: remove and check; the others are in `pins`. The running node calls
//! this, and so do the commands on a data directory that no node has open.
//!
//! Owns what a target is (a model or one object) and which objects go with it. Refuses to remove
//! pinned objects unless forced, and with a model never removes objects that another model here has
//! or pins, too.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use tokio::sync::mpsc;

use super::api::{Damage, FsckEvent, FsckSummary, TargetReply};
use super::catalog::sizes;
use super::resolve::{Candidate, PREFIX_MIN, Standing, Unresolved, did_you_mean, resolve};
use super::trust::TrustStore;
use super::{kept, pins};
use doppler_store::disk::{Checkup, DiskTier, ObjectInfo};
use doppler_store::ladder::Ladder;
use doppler_store::manifest::{MANIFEST_BYTES_MAX, Manifest};
use doppler_store::{ByteRange, ModelId, ShardId};

/// Events of a check that a slow listener may lag behind before the check waits.
const EVENTS_MAX: usize = 256;

/// A model whose manifest is known.
#[derive(Debug, Clone)]
pub struct StoredModel {
    pub id: ModelId,
    pub name: String,
    /// The manifest itself, the shards and the tokenizer, with their sizes if known.
    objects: Vec<(ShardId, Option<u64>)>,
}

impl StoredModel {
    /// `None` if the manifest's shards have no addresses.
    pub fn new(id: ModelId, manifest: &Manifest) -> Option<Self> {
        let mut objects = vec![(id.manifest(), None)];
        objects.extend(sizes(manifest).ok()?.into_iter().map(|(shard, size)| (shard, Some(size))));
        Some(Self { id, name: manifest.model_id.clone(), objects })
    }

    /// A model with these objects, and their sizes in bytes where they are known.
    pub const fn with_objects(
        id: ModelId,
        name: String,
        objects: Vec<(ShardId, Option<u64>)>,
    ) -> Self {
        Self { id, name, objects }
    }

    /// Ids of its objects.
    pub fn objects(&self) -> impl Iterator<Item = ShardId> {
        self.objects.iter().map(|(shard, _)| *shard)
    }

    /// The size in bytes of one of its objects, if the model knows it.
    pub fn size_of(&self, shard: ShardId) -> Option<u64> {
        self.objects.iter().find(|(id, _)| *id == shard).and_then(|(_, size)| *size)
    }
}

/// The target of a command.
#[derive(Debug, Clone)]
pub enum Target {
    Model(StoredModel),
    Object(ShardId),
}

impl Target {
    /// Finds the model or the object that `text` names. `models` are those of `named` whose
    /// objects are known, `objects` may be named by themselves.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn resolve(
        text: &str,
        named: &[Candidate],
        models: Vec<StoredModel>,
        objects: &BTreeSet<ShardId>,
    ) -> anyhow::Result<Self> {
        let near = match resolve(text, named) {
            Ok(id) => {
                let model = models.into_iter().find(|model| model.id == id);
                return model.map(Self::Model).with_context(|| {
                    format!("the manifest of model {id} is not here: pin {id} --fetch fetches it")
                });
            }
            Err(Unresolved::Unknown { near, .. }) => near,
            Err(ambiguous) => return Err(ambiguous.into()),
        };
        let lower = text.to_lowercase();
        let begins = |id: String| lower.len() >= PREFIX_MIN && id.starts_with(&lower);
        let mut stored = objects.iter().filter(|shard| begins(shard.to_string()));
        let first = stored.next().with_context(|| {
            let near = did_you_mean(&near);
            format!("{text:?} is neither a model known here nor an object stored here{near}")
        })?;
        ensure!(stored.next().is_none(), "{text:?} is more than one object: give more of its id");
        Ok(Self::Object(*first))
    }

    pub fn model(&self) -> Option<ModelId> {
        match self {
            Self::Model(model) => Some(model.id),
            Self::Object(_) => None,
        }
    }

    /// The objects that belong to it, with their sizes if known.
    pub fn objects(&self) -> Vec<(ShardId, Option<u64>)> {
        match self {
            Self::Model(model) => model.objects.clone(),
            Self::Object(shard) => vec![(*shard, None)],
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Model(model) => format!("{} ({})", model.name, model.id),
            Self::Object(shard) => shard.to_string(),
        }
    }
}

/// The models whose manifests are whole in a store that no node has open, and those that pin
/// something in it.
pub async fn stored_models(disk: &DiskTier) -> anyhow::Result<Vec<StoredModel>> {
    let mut models = Vec::new();
    for object in disk.list().await? {
        if object.whole {
            models.extend(stored_model(disk, ModelId::from(*object.shard.as_bytes())).await);
        }
    }
    pins::add_pinned(disk, &mut models).await;
    Ok(models)
}

/// A model whose manifest is whole in the store.
pub async fn stored_model(disk: &DiskTier, id: ModelId) -> Option<StoredModel> {
    let shard = id.manifest();
    let size = disk.groups(shard).await.filter(|_| disk.is_whole(shard))?.size();
    if size > MANIFEST_BYTES_MAX as u64 {
        return None;
    }
    // A manifest is a JSON object, so most other objects differ in their first byte.
    let begins = disk.read(shard, ByteRange::new(0, 1)?).await.ok()??;
    if begins.bytes().first() != Some(&b'{') {
        return None;
    }
    let read = disk.read(shard, ByteRange::new(0, size)?).await.ok()??;
    StoredModel::new(id, &Manifest::parse(read.bytes()).ok()?)
}

/// A model by its name in its manifest.
pub fn candidate(data: &Path, model: &StoredModel) -> Candidate {
    Candidate {
        id: model.id,
        name: model.name.clone(),
        publisher: String::new(),
        standing: match published_file(data, model.id).exists() {
            true => Standing::Own,
            false => Standing::Stranger,
        },
    }
}

/// The models in a store that no node has open, with every known name: those of their signers and
/// those in their manifests.
pub fn candidates(data: &Path, models: &[StoredModel]) -> Vec<Candidate> {
    // A damaged list of trust is told where it decides; here it trusts nobody.
    let trust = TrustStore::open(data).and_then(|store| store.read()).unwrap_or_default();
    let mut candidates = Vec::new();
    for model in models {
        candidates.push(candidate(data, model));
        for signed in kept::signed(data, model.id).unwrap_or_default() {
            candidates.push(Candidate {
                id: model.id,
                standing: match signed.publisher {
                    key if trust.trusts(key) => Standing::Trusted,
                    key if trust.refused.contains(&key) => Standing::Refused,
                    _ => Standing::Stranger,
                },
                name: signed.name,
                publisher: signed.publisher.to_string(),
            });
        }
    }
    candidates
}

/// Which model `text` means in a store that no node has open.
///
/// # Errors
/// If there is none, or more than one.
pub async fn find_model(disk: &DiskTier, data: &Path, text: &str) -> anyhow::Result<ModelId> {
    Ok(resolve(text, &candidates(data, &stored_models(disk).await?))?)
}

/// What is known in the store of a target's objects.
pub async fn held(disk: &DiskTier, target: &Target) -> anyhow::Result<Vec<ObjectInfo>> {
    let ids: HashSet<ShardId> = target.objects().into_iter().map(|(shard, _)| shard).collect();
    let mut list = disk.list().await?;
    list.retain(|object| ids.contains(&object.shard));
    Ok(list)
}

pub fn reply(target: &Target, held: &[ObjectInfo]) -> TargetReply {
    let whole = held.iter().filter(|object| object.whole).count();
    let all: HashSet<ShardId> = target.objects().into_iter().map(|(shard, _)| shard).collect();
    TargetReply {
        target: target.describe(),
        objects: held.len(),
        bytes: held.iter().map(|object| object.held).sum(),
        missing: all.len() - whole,
        shared: 0,
        last_copies: 0,
    }
}

/// What a removal will remove, and the reply to it.
pub struct Removal {
    /// The objects, with the bytes of each that are held on disk.
    pub objects: Vec<(ShardId, u64)>,
    /// Everything of the target that no other model here needs, on disk or not. RAM may have it.
    pub unneeded: Vec<ShardId>,
    pub reply: TargetReply,
}

/// # Errors
/// If some of it is pinned and `force` is not given.
pub async fn plan_removal(
    disk: &DiskTier,
    target: &Target,
    models: &[StoredModel],
    force: bool,
) -> anyhow::Result<Removal> {
    let mut objects = held(disk, target).await?;
    let mut unneeded: Vec<ShardId> = target.objects().iter().map(|(shard, _)| *shard).collect();
    let mut shared = 0;
    if let Target::Model(model) = target {
        let others = models
            .iter()
            .filter(|other| other.id != model.id && disk.is_whole(other.id.manifest()));
        let theirs: HashSet<ShardId> =
            others.flat_map(|other| other.objects.iter().map(|(shard, _)| *shard)).collect();
        let pinned_by_others =
            |shard: ShardId| disk.pinned_by(shard).iter().any(|other| *other != model.id);
        let is_needed = |shard: ShardId| theirs.contains(&shard) || pinned_by_others(shard);
        unneeded.retain(|shard| !is_needed(*shard));
        let before = objects.len();
        objects.retain(|object| !is_needed(object.shard));
        shared = before - objects.len();
    }
    let pinned = objects.iter().filter(|object| object.pinned).count();
    let unpin = match target {
        Target::Model(model) if !disk.model_pins().contains_key(&model.id) => "unpin them by id",
        _ => "unpin it first",
    };
    ensure!(
        force || pinned == 0,
        "{}: {pinned} of {} stored objects are pinned; {unpin}, or give --force",
        target.describe(),
        objects.len()
    );
    let reply = TargetReply { shared, ..reply(target, &objects) };
    let objects = objects.into_iter().map(|object| (object.shard, object.held)).collect();
    Ok(Removal { objects, unneeded, reply })
}

/// Forgets that this node published a model and that it keeps it.
pub fn withdraw(data: &Path, model: ModelId) -> anyhow::Result<()> {
    kept::remove(data, model)?;
    let path = published_file(data, model);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The file with a published model's signature, from which it is announced again at the next start.
pub fn published_file(data: &Path, model: ModelId) -> std::path::PathBuf {
    data.join("published").join(format!("{model}.json"))
}

/// Checks everything stored, one object after another, in its own task. With a ladder, damaged
/// objects are fetched again. `_guard` is dropped at the end. If the listener goes away, the check
/// ends early.
pub fn fsck(
    disk: DiskTier,
    repair: Option<Ladder>,
    guard: impl Send + 'static,
) -> mpsc::Receiver<FsckEvent> {
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(async move {
        if let Err(error) = check_all(&disk, repair.as_ref(), &sender).await {
            let message = super::one_line(&error);
            let _ = sender.send(FsckEvent::Error { message }).await;
        }
        drop(guard);
    });
    events
}

async fn check_all(
    disk: &DiskTier,
    repair: Option<&Ladder>,
    events: &mpsc::Sender<FsckEvent>,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let list = disk.list().await?;
    let bytes = list.iter().map(|object| object.held).sum();
    events.send(FsckEvent::Start { objects: list.len() as u64, bytes }).await?;
    let mut summary = FsckSummary::default();
    // Damage that was found when the store was opened. What is still here is also checked below.
    for checkup in disk.damage_at_open() {
        let is_here = list.iter().any(|object| object.shard == checkup.shard);
        if !is_here {
            report(disk, repair, &checkup, &mut summary, events).await?;
        }
    }
    let at_open = disk.damage_at_open();
    for object in list {
        let before = at_open.iter().find(|checkup| checkup.shard == object.shard);
        let checkup = match disk.check(object.shard).await? {
            Some(checkup) => checkup,
            // Removed meanwhile, or pinned and completely lost.
            None if !object.pinned => continue,
            None => Checkup {
                shard: object.shard,
                size: object.size,
                checked_bytes: 0,
                damaged: Vec::new(),
                outboard_rewritten: false,
            },
        };
        summary.objects += 1;
        summary.checked_bytes += checkup.checked_bytes;
        let incomplete = object.pinned && !disk.is_whole(object.shard);
        let earlier = before.filter(|_| !disk.is_whole(object.shard));
        if let Some(earlier) = earlier {
            let mut damaged = earlier.damaged.clone();
            damaged.extend(&checkup.damaged);
            let both = Checkup { damaged, ..checkup };
            report(disk, repair, &both, &mut summary, events).await?;
        } else if !checkup.damaged.is_empty() || checkup.outboard_rewritten || incomplete {
            report(disk, repair, &checkup, &mut summary, events).await?;
        } else {
            let (shard, bytes) = (checkup.shard, checkup.checked_bytes);
            events.send(FsckEvent::Checked { shard, bytes }).await?;
        }
        if object.pinned && !disk.is_whole(object.shard) {
            summary.incomplete_pinned += 1;
        }
    }
    disk.flush().await?;
    summary.seconds = started.elapsed().as_secs_f64();
    events.send(FsckEvent::End(summary)).await?;
    Ok(())
}

async fn report(
    disk: &DiskTier,
    repair: Option<&Ladder>,
    checkup: &Checkup,
    summary: &mut FsckSummary,
    events: &mpsc::Sender<FsckEvent>,
) -> anyhow::Result<()> {
    let outboard_only = checkup.outboard_rewritten && checkup.damaged.is_empty();
    let mut detail = None;
    if outboard_only {
        summary.outboards_rewritten += 1;
    } else {
        summary.damaged_objects += u64::from(!checkup.damaged.is_empty());
        summary.damaged_bytes += checkup.damaged_bytes();
        if let Some(ladder) = repair {
            detail = ladder.repair(checkup.shard).await.err().map(|error| error.to_string());
        }
    }
    let repaired = outboard_only || repair.is_some() && disk.is_whole(checkup.shard);
    summary.repaired_objects += u64::from(repaired && !outboard_only);
    let damage = Damage {
        shard: checkup.shard,
        size: checkup.size,
        checked_bytes: checkup.checked_bytes,
        ranges: checkup.damaged.clone(),
        outboard_only,
        repaired,
        detail,
    };
    events.send(FsckEvent::Damage(damage)).await?;
    Ok(())
}
