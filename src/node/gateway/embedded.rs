//! The small model that comes with the binary, for pages. Its objects are served like any that is
//! held, so a tab can fetch, verify and run it from a node whose store is empty.
//!
//! They stay in the binary: nothing is written to the store, announced, or served to peers.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{OnceCell, watch};

use crate::api::ModelInfo;
use crate::embedded;
use crate::resolve::Standing;
use doppler_store::verified::Encoded;
use doppler_store::{
    ByteRange, Ladder, LadderOptions, Manifest, ModelId, ReadError, Replicas, ShardId, ShardServe,
};

/// Room for all of them: none is evicted.
const RAM: u64 = 64 << 20;

/// A store, backed by the objects of the embedded model.
pub struct WithEmbedded {
    store: Arc<dyn ShardServe>,
    /// Made when a page first asks for something that the store does not have.
    objects: OnceCell<Ladder>,
}

impl WithEmbedded {
    pub fn new(store: Arc<dyn ShardServe>) -> Self {
        Self { store, objects: OnceCell::new() }
    }

    async fn objects(&self) -> &Ladder {
        let make = || async {
            let ladder = Ladder::new(LadderOptions { ram_budget: RAM }, None, None, Vec::new());
            for bytes in embedded::objects() {
                // There is room; a test reads each of them.
                let _ = ladder.put(Bytes::from_static(bytes), false).await;
            }
            ladder
        };
        self.objects.get_or_init(make).await
    }
}

/// The model's id and manifest.
pub fn model() -> Option<(ModelId, Manifest)> {
    let bytes = embedded::manifest();
    Some((ModelId::of(bytes), Manifest::parse(bytes).ok()?))
}

/// `GET /models/embedded`
pub fn info() -> Option<ModelInfo> {
    let (id, manifest) = model()?;
    let shards = manifest.shards.len();
    Some(ModelInfo {
        id: id.to_string(),
        name: manifest.model_id.clone(),
        publishers: Vec::new(),
        trust: Standing::Own,
        bytes: manifest.total_size,
        replicas: Replicas::DEFAULT,
        shards,
        shards_here: shards,
        shards_reachable: shards,
        pinned: false,
        copies: None,
        base: None,
        manifest: true,
        signers: Vec::new(),
    })
}

impl ShardServe for WithEmbedded {
    fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> BoxFuture<'_, Result<Encoded, ReadError>> {
        async move {
            match self.store.encode(shard, range).await {
                Err(ReadError::NotFound { .. }) => self.objects().await.encode(shard, range).await,
                held => held,
            }
        }
        .boxed()
    }

    fn complete(&self) -> Vec<ShardId> {
        self.store.complete()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.store.changes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_empty_store_gives_the_embedded_model_whole_and_proved() {
        let (_, manifest) = model().unwrap();
        let empty = Ladder::new(LadderOptions { ram_budget: 0 }, None, None, Vec::new());
        let serve = WithEmbedded::new(Arc::new(empty));
        assert!(serve.complete().is_empty(), "nothing of it is offered to peers");
        let tokenizer = manifest.tokenizer.as_ref().unwrap();
        let shards = manifest.shards.iter().map(|shard| (shard.id().unwrap(), shard.size));
        for (id, size) in shards.chain([(tokenizer.id.unwrap(), tokenizer.size.unwrap())]) {
            let range = ByteRange::new(size / 2, size).unwrap();
            let encoded = serve.encode(id, range).await.unwrap();
            assert_eq!(encoded.size, size);
            let data: Vec<u8> = encoded.data(range).unwrap().concat();
            assert_eq!(data.len() as u64, range.len());
        }
        let absent = serve.encode(ShardId::of(b"x"), ByteRange::new(0, 1).unwrap()).await;
        assert!(matches!(absent, Err(ReadError::NotFound { .. })));
    }
}
