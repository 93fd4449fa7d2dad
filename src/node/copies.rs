//! How many copies the objects of a model have, and who holds them, for `ls` and the page.
//!
//! Counts as healing does: live peers that say they hold an object whole, are not missing and do
//! not leave, and this node.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::api::ModelInfo;
use super::catalog::{Known, sizes};
use super::resolve::resolve;
use super::service::Service;
use super::targets::Object;
use doppler_mesh::Kept;
use doppler_store::{ModelId, Replicas, ShardId};

/// The copies of a model's objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Copies {
    /// Nodes that hold the rarest object, and the commonest.
    pub fewest: usize,
    pub most: usize,
    /// Objects with fewer copies than there should be, the bytes of copies that are missing, and the
    /// seconds until they are there at the present rate. Only of models that this node helps to
    /// keep.
    pub lacking: usize,
    pub lacking_bytes: u64,
    #[serde(default)]
    pub left_s: Option<f64>,
}

/// `POST /control/v1/models/copies`; answered by [`ModelCopies`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopiesRequest {
    /// A model's name, id or unambiguous start of it.
    pub model: String,
}

/// A model with the copies of each object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelCopies {
    #[serde(flatten)]
    pub model: ModelInfo,
    /// The manifest, then the shards in its order, then the other files.
    pub objects: Vec<ObjectCopies>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ObjectCopies {
    pub id: ShardId,
    /// `manifest`, `shard 3`, or the file's name.
    pub what: String,
    /// Bytes.
    pub size: u64,
    pub copies: usize,
    /// Peer ids of the nodes that hold it whole, this node's first.
    pub holders: Vec<String>,
    pub here: Here,
    /// Whether this node copies it now.
    pub is_copying: bool,
}

/// Why an object is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Here {
    /// It is not, or not whole.
    No,
    Pinned,
    /// Because the swarm had too few copies.
    Replica,
    /// It was used.
    Cached,
}

impl Here {
    pub const fn word(self) -> &'static str {
        match self {
            Self::No => "-",
            Self::Pinned => "pinned",
            Self::Replica => "replica",
            Self::Cached => "cached",
        }
    }
}

fn copies(kept: &Kept) -> usize {
    kept.holders.len() + usize::from(kept.is_here)
}

impl Service {
    /// The copies of a model's objects; `None` while its manifest is not here.
    pub(super) fn copies_of(&self, model: ModelId, known: &Known) -> Option<Copies> {
        let counted = self.counted(&self.objects_of(model, known, Replicas::DEFAULT)?, None);
        // Everybody who has heard of the model may have its manifest.
        let all = counted.iter().filter(|kept| kept.shard != model.manifest());
        let numbers = all.map(copies);
        let (lacking, lacking_bytes, left_s) = self.healer.lacking_of(model);
        let (fewest, most) = (numbers.clone().min()?, numbers.max()?);
        Some(Copies { fewest, most, lacking, lacking_bytes, left_s })
    }

    fn objects_of(
        &self,
        model: ModelId,
        known: &Known,
        replicas: Replicas,
    ) -> Option<BTreeMap<ShardId, Object>> {
        let manifest = known.manifest.as_ref()?;
        let object = |size| Object { size, replicas, model };
        let first = (model.manifest(), self.ladder.expected_size(model.manifest()).unwrap_or(0));
        let all = sizes(manifest).ok()?.into_iter().chain([first]);
        Some(all.map(|(shard, size)| (shard, object(size))).collect())
    }

    /// A model with the copies of each of its objects.
    ///
    /// # Errors
    /// If no known model is meant, or more than one, or if its manifest is not here.
    pub fn model_copies(&self, request: &CopiesRequest) -> anyhow::Result<ModelCopies> {
        let model = resolve(&request.model, &self.candidates()?)?;
        let known = self.catalog.get(model);
        let known = known.with_context(|| format!("model {model} was withdrawn meanwhile"))?;
        let absent =
            || format!("the manifest of model {model} is not here: pin {model} --fetch fetches it");
        let manifest = known.manifest.clone().with_context(absent)?;
        let objects = self.objects_of(model, &known, Replicas::DEFAULT).with_context(absent)?;
        let counted: BTreeMap<ShardId, Kept> =
            self.counted(&objects, None).into_iter().map(|kept| (kept.shard, kept)).collect();
        let shards = manifest.shards.iter().enumerate();
        let shards = shards.filter_map(|(n, shard)| Some((shard.id().ok()?, format!("shard {n}"))));
        let other = manifest.tokenizer.as_ref();
        let other = other.and_then(|file| Some((file.id?, file.file.clone())));
        let first = (model.manifest(), "manifest".to_owned());
        let named = [first].into_iter().chain(shards).chain(other);
        let object = |(id, what): (ShardId, String)| {
            let kept = counted.get(&id)?;
            Some(ObjectCopies {
                id,
                what,
                size: kept.size,
                copies: copies(kept),
                holders: self.holders_of(kept).iter().map(ToString::to_string).collect(),
                here: match kept.is_here {
                    false => Here::No,
                    true if self.disk.is_pinned(id) => Here::Pinned,
                    true if kept.is_replica => Here::Replica,
                    true => Here::Cached,
                },
                is_copying: self.healer.is_copying(id),
            })
        };
        let objects = named.filter_map(object).collect();
        Ok(ModelCopies { model: self.info_of(model)?, objects })
    }
}
