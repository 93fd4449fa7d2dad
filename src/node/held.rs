//! Models that the store of a data directory holds, for commands that compute by themselves:
//! `check`, `perplexity`, `bench`, `trace record`, and `run` where no node runs.
//!
//! The store's files are plain and named by their hashes, so they can be read even while a node
//! runs; every byte is verified. Refuses a model that is not complete here.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};

use super::api::{ModelInfo, ResolveRequest};
use super::catalog::sizes;
use super::commands::{asking, can_ask};
use super::size::ByteSize;
use super::store_access::StoreAccess;
use super::trust::{TrustPolicy, TrustStore};
use super::{adapters, kept, storage};
use doppler_infer::adapter::Adapter;
use doppler_store::dir::{DirReader, DirShard};
use doppler_store::disk::object_path;
use doppler_store::manifest::Manifest;
use doppler_store::{ModelId, ShardId, regular};

/// A model whose objects are all here.
pub struct Held {
    pub manifest: Manifest,
    /// The bytes of tokenizer.json.
    pub tokenizer: Option<Vec<u8>>,
    pub reader: Arc<DirReader>,
}

/// Finds the model that `text` means in the store at `data`, and reads its manifest.
///
/// # Errors
/// If the store knows no such model or more than one, if its publisher may not be used, or if part
/// of it is not here (the error says how much).
pub fn open(data: &Path, text: &str) -> anyhow::Result<Held> {
    open_in(StoreAccess::open(data)?, data, text)
}

/// As [`open`], in a store that has been opened.
pub fn open_in(access: StoreAccess, data: &Path, text: &str) -> anyhow::Result<Held> {
    let model = find(access, text)?;
    let id = model.to_string();
    let bytes = proved(data, model.manifest()).with_context(|| format!("the manifest of {id}"))?;
    let manifest = Manifest::parse(&bytes).with_context(|| format!("the manifest of {id}"))?;
    let (mut missing, mut lacking) = (0, 0);
    let objects = sizes(&manifest)?;
    for (shard, size) in &objects {
        let path = object_path(data, *shard);
        if std::fs::metadata(&path).map_or(true, |found| found.len() != *size) {
            missing += 1;
            lacking += size;
        }
    }
    ensure!(
        missing == 0,
        "{missing} of {} objects of {} ({}) are not in {}: fetch them with \
         doppler-node pin {} --fetch",
        objects.len(),
        manifest.model_id,
        ByteSize(lacking),
        data.display(),
        id
    );
    let tokenizer = match manifest.tokenizer.as_ref().and_then(|tokenizer| tokenizer.id) {
        Some(id) => Some(proved(data, id)?),
        None => None,
    };
    let shards = manifest.shards.iter().map(|shard| {
        let id = shard.id()?;
        Ok(DirShard { shard: id, path: object_path(data, id), size: shard.size })
    });
    let reader = DirReader::new(shards.collect::<anyhow::Result<Vec<_>>>()?);
    Ok(Held { manifest, tokenizer, reader: Arc::new(reader) })
}

/// Opens the adapter that `text` means in the store at `data`.
///
/// # Errors
/// As [`open`], or if it is no adapter.
pub fn adapter(data: &Path, text: &str) -> anyhow::Result<Adapter> {
    let held = open(data, text)?;
    adapters::stored(&held.manifest, |shard| proved(data, shard))
}

fn find(access: StoreAccess, text: &str) -> anyhow::Result<ModelId> {
    match access {
        StoreAccess::Node(client) => asking(|trust| {
            let request = ResolveRequest { model: text.to_owned(), trust, can_ask: can_ask() };
            let model: ModelInfo = client.post("/control/v1/models/resolve", &request)?;
            Ok(model.id.parse()?)
        }),
        StoreAccess::Here { disk, runtime, data } => {
            let model =
                runtime.block_on(async { storage::find_model(&disk, &data, text).await })?;
            not_refused(&data, model, text)?;
            Ok(model)
        }
    }
}

/// A model that is here whole was admitted when it was fetched, although its publishers may have
/// been removed from the trusted ones since.
fn not_refused(data: &Path, model: ModelId, text: &str) -> anyhow::Result<()> {
    let signed = kept::signed(data, model).unwrap_or_default();
    if signed.is_empty() || storage::published_file(data, model).exists() {
        return Ok(());
    }
    let signers: Vec<_> = signed.iter().map(|one| one.publisher).collect();
    let trust = TrustStore::open(data)?;
    trust.check(TrustPolicy::Any, &model.to_string(), text, &signers, false)?;
    Ok(())
}

/// A whole object, if its bytes match its name.
fn proved(data: &Path, shard: ShardId) -> anyhow::Result<Vec<u8>> {
    let path = object_path(data, shard);
    let bytes = regular::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if ShardId::of(&bytes) != shard {
        bail!("{} is damaged: doppler-node fsck --repair repairs it", path.display());
    }
    Ok(bytes)
}
