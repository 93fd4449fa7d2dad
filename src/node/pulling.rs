//! Fetches the missing objects of a model: asks the ladder for those that `doppler_mesh::Pull`
//! chooses, and reports progress.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, anyhow};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;

use super::pins;
use super::service::Service;
use super::storage::Target;
use super::work::{PROGRESS_EVERY, Report};
use doppler_mesh::{Pull, PullAction, PullEvent, Wanted};
use doppler_store::{Priority, ShardId, StoreError};

/// The most objects fetched at once for pinning. At most 64 MiB of each are in memory.
const PULLS_AT_ONCE: usize = 2;

impl Service {
    /// Fetches and pins every object of a target that is not complete here.
    ///
    /// # Errors
    /// If the budget or the disk has no room for all of it. Then nothing is fetched. If an object
    /// does not arrive or cannot be kept. What arrived before stays pinned.
    pub(super) async fn fetch_missing(
        &self,
        target: &Target,
        report: &Report,
    ) -> anyhow::Result<()> {
        let (mut all, mut missing) = (Vec::new(), Vec::new());
        for (shard, size) in target.objects() {
            let size = size.or_else(|| self.ladder.expected_size(shard));
            if !self.disk.is_whole(shard) {
                let size = size.with_context(|| {
                    format!("{shard}: its size is not known here, and no manifest says it")
                })?;
                missing.push((shard, size));
            }
            all.extend(size.map(|size| (shard, size)));
        }
        self.disk.check_room(all)?;
        self.disk.check_space(missing.clone()).await?;
        let held: BTreeMap<ShardId, u64> =
            self.disk.list().await?.into_iter().map(|object| (object.shard, object.held)).collect();
        let objects = missing.len();
        let wanted = missing.iter().map(|&(shard, size)| (shard, size)).map(|(shard, size)| {
            let held = held.get(&shard).copied().unwrap_or_default();
            Wanted { shard, size, held }
        });
        let pull = Pull::new(Instant::now(), wanted, PULLS_AT_ONCE);
        let pulled = self.pull(target, pull, objects, report).await;
        let is_full = |error: &anyhow::Error| {
            error.chain().filter_map(|cause| cause.downcast_ref()).any(StoreError::is_full)
        };
        if pulled.as_ref().is_err_and(is_full) {
            // Others have filled the disk in the meantime: the error says how much the rest needs.
            let came = missing.iter().filter(|(shard, _)| self.disk.is_whole(*shard)).count();
            let lack = self.disk.check_space(missing).await;
            lack.with_context(|| came_of(came, objects))?;
        }
        pulled
    }

    async fn pull(
        &self,
        target: &Target,
        mut pull: Pull,
        objects: usize,
        report: &Report,
    ) -> anyhow::Result<()> {
        let holders = |shard: ShardId| self.mesh.holdings(shard).len();
        let coming = |shard: ShardId| self.mesh.coming(shard);
        let slowest = || self.mesh.slowest().map(|peer| peer.to_string());
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut fetching = FuturesUnordered::new();
        let mut event = PullEvent::Begin;
        let mut failure = anyhow!("nothing was fetched");
        loop {
            for action in pull.on(event, &holders) {
                match action {
                    PullAction::Fetch(wanted) => {
                        fetching.push(async move {
                            (wanted.shard, self.fetch_one(target, wanted).await)
                        });
                    }
                    PullAction::Done => {
                        report(pull.progress(Instant::now(), &coming));
                        return Ok(());
                    }
                    PullAction::GiveUp { objects: left } => {
                        let came = objects.saturating_sub(left);
                        return Err(failure.context(came_of(came, objects)));
                    }
                }
            }
            event = loop {
                tokio::select! {
                    Some((shard, fetched)) = fetching.next() => match fetched {
                        Ok(()) => break PullEvent::Fetched(shard),
                        Err(error) => {
                            failure = error;
                            break PullEvent::Failed(shard);
                        }
                    },
                    _ = tick.tick() => report(pull.progress(Instant::now(), &coming).naming(slowest)),
                }
            };
        }
    }

    async fn fetch_one(&self, target: &Target, wanted: Wanted) -> anyhow::Result<()> {
        let Wanted { shard, size, .. } = wanted;
        self.fetch_whole(shard, size, None).await?;
        // At once, so that it stays even if the rest fails.
        pins::pin_one(&self.disk, target, shard, size).await
    }

    /// Fetches a whole object and keeps it on disk.
    ///
    /// # Errors
    /// If it does not arrive, or cannot be written to disk.
    pub(super) async fn fetch_whole(
        &self,
        shard: ShardId,
        size: u64,
        deadline: Option<Instant>,
    ) -> anyhow::Result<()> {
        let bytes = self.ladder.get_whole(shard, size, Priority::Bulk, deadline).await?;
        self.ladder.flush().await?;
        if !self.disk.is_whole(shard) {
            // It came from RAM, or was not kept on arrival. It is written to disk now, or the error
            // says why not.
            self.disk.put(bytes, false).await?;
        }
        Ok(())
    }
}

fn came_of(came: usize, objects: usize) -> String {
    format!("{came} of {objects} missing objects were fetched")
}
