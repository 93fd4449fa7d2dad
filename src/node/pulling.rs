//! Brings what is missing of a model here: asks the ladder for what `doppler_mesh::Pull` says, and
//! tells how far it has come.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, anyhow};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;

use super::service::Service;
use super::storage::Target;
use super::work::{PROGRESS_EVERY, Report};
use doppler_mesh::{Pull, PullAction, PullEvent, Wanted};
use doppler_store::{Priority, ShardId};

/// Objects fetched at once to be pinned: at most 64 MiB of each are in memory.
const PULLS_AT_ONCE: usize = 2;

impl Service {
    /// Fetches and pins every object of a target that is not here whole.
    ///
    /// # Errors
    /// If there is no room for all of it: nothing is fetched then. If one of them does not come:
    /// what came before stays, pinned.
    pub(super) async fn fetch_missing(
        &self,
        target: &Target,
        report: &Report,
    ) -> anyhow::Result<()> {
        let mut missing = Vec::new();
        for (shard, size) in target.objects() {
            if !self.disk.is_whole(shard) {
                let size = size.with_context(|| format!("{shard}: its size is not known here"))?;
                missing.push((shard, size));
            }
        }
        self.disk.check_room(missing.iter().copied())?;
        let held: BTreeMap<ShardId, u64> =
            self.disk.list().await?.into_iter().map(|object| (object.shard, object.held)).collect();
        let objects = missing.len();
        let wanted = missing.into_iter().map(|(shard, size)| {
            let held = held.get(&shard).copied().unwrap_or_default();
            Wanted { shard, size, held }
        });
        let pull = Pull::new(Instant::now(), wanted, PULLS_AT_ONCE);
        self.pull(pull, objects, report).await
    }

    async fn pull(&self, mut pull: Pull, objects: usize, report: &Report) -> anyhow::Result<()> {
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
                        fetching.push(async move { (wanted.shard, self.fetch_one(wanted).await) });
                    }
                    PullAction::Done => {
                        report(pull.progress(Instant::now(), &coming));
                        return Ok(());
                    }
                    PullAction::GiveUp { objects: left } => {
                        let came = objects.saturating_sub(left);
                        return Err(failure
                            .context(format!("{came} of {objects} missing objects were fetched")));
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

    async fn fetch_one(&self, Wanted { shard, size, .. }: Wanted) -> anyhow::Result<()> {
        self.ladder.get_whole(shard, size, Priority::Bulk, None).await?;
        self.ladder.flush().await?;
        // At once, or the next one may push it out.
        Ok(self.disk.pin(shard).await?)
    }
}
