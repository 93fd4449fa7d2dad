//! Healing in the running node: looks at the swarm when it may have changed, copies what
//! `mesh::core::Healing` says, drops surplus copies, and tells the disk which copies to spare and the
//! mesh how much room there is.
//!
//! Decides nothing itself. A copy is an ordinary read of a whole object that yields to what a token
//! waits for; it counts as a replica once it is durable. Invariants: only objects that
//! `node::targets` names are copied; nothing is looked at while nothing happens; the disk spares
//! everything of which too few others have a copy, as of the last look.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep_until, timeout};

use super::service::Service;
use super::targets::Object;
use doppler_mesh::{
    HealAction, HealOptions, HealView, Healing, Kept, Meter, Offer, PeerId, Progress,
};
use doppler_store::{ByteRange, ModelId, Priority, RangeReader, ReadRequest, Replicas, ShardId};

/// How often the swarm is looked at while something happens or is about to.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How soon after a copy has ended the next one may begin.
const LOOK_AFTER_COPY: Duration = Duration::from_millis(100);
/// How often the swarm is looked at while nothing happens: a ban may end, or the list of trusted
/// publishers may have changed.
const LOOK_AT_LEAST: Duration = Duration::from_secs(30);
/// Bytes of one read of a copy. Four copies are made at a time, so this bounds their memory.
const READ_BYTES: u64 = 16 << 20;

/// What healing has done and has to do, for `status` and `ls`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HealStatus {
    /// Bytes of copies that this node may keep for the swarm. 0: none.
    pub budget: u64,
    /// Bytes of copies that it keeps for the swarm now, and how many more it offers to keep.
    pub replica_bytes: u64,
    pub room: u64,
    /// Objects, of the models that this node helps to keep, that have fewer copies than they
    /// should; of those, the ones that nobody reachable holds; and the bytes of copies that are
    /// missing.
    pub lacking: usize,
    pub lost: usize,
    pub lacking_bytes: u64,
    /// Objects that this node copies now, and their bytes.
    pub under_way: usize,
    pub under_way_bytes: u64,
    /// Copies made since the node started, their bytes, and surplus copies dropped.
    pub copied: u64,
    pub copied_bytes: u64,
    pub dropped: u64,
    /// Bytes a second by which what is lacking shrinks, whoever copies it, and the seconds left.
    #[serde(default)]
    pub rate: Option<f64>,
    #[serde(default)]
    pub left_s: Option<f64>,
    /// Whether this node is about to leave.
    pub is_leaving: bool,
}

/// What the last look saw.
#[derive(Debug, Default)]
struct Seen {
    status: HealStatus,
    /// Of each model, the objects that lack copies and the bytes missing.
    by_model: BTreeMap<ModelId, (usize, u64)>,
    under_way: BTreeSet<ShardId>,
    /// Measures how what is lacking shrinks; starts anew once nothing is lacking or it has grown.
    meter: Option<(Meter, u64)>,
}

/// What the rest of the node asks of healing, and tells it.
pub struct Healer {
    pub(super) budget: u64,
    rate: Option<u64>,
    seen: Mutex<Seen>,
    /// Since when this node has been about to leave.
    leaving: watch::Sender<Option<Instant>>,
}

impl Healer {
    /// `budget` in bytes, `rate` in bytes a second.
    pub fn new(budget: u64, rate: Option<u64>) -> Self {
        Self { budget, rate, seen: Mutex::default(), leaving: watch::Sender::new(None) }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Nothing in here can be left half-changed by a panic.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn status(&self) -> HealStatus {
        HealStatus { is_leaving: self.leaves_since().is_some(), ..self.seen().status.clone() }
    }

    /// The objects of a model that lack copies, the bytes missing, and the seconds left.
    pub fn lacking_of(&self, model: ModelId) -> (usize, u64, Option<f64>) {
        let seen = self.seen();
        let (objects, bytes) = seen.by_model.get(&model).copied().unwrap_or_default();
        let rate = seen.status.rate.filter(|rate| *rate > 0.0);
        (objects, bytes, rate.map(|rate| bytes as f64 / rate))
    }

    pub fn is_copying(&self, shard: ShardId) -> bool {
        self.seen().under_way.contains(&shard)
    }

    pub fn leaves_since(&self) -> Option<Instant> {
        *self.leaving.borrow()
    }

    pub fn set_leaving(&self, since: Option<Instant>) {
        self.leaving.send_replace(since);
    }
}

/// Copies in flight.
#[derive(Default)]
struct Copying {
    tasks: JoinSet<(ShardId, anyhow::Result<u64>)>,
    handles: BTreeMap<ShardId, AbortHandle>,
}

/// Heals as long as the node runs.
pub async fn heal(service: Arc<Service>) {
    let options = HealOptions { budget: service.healer.budget, rate: service.healer.rate };
    let mut healing = Healing::new(service.mesh.peer_id(), options);
    let mut copying = Copying::default();
    let mut changed = service.mesh.watch_changes();
    let mut stored = service.disk.changes();
    let mut known = service.catalog.changes();
    let mut leaving = service.healer.leaving.subscribe();
    loop {
        changed.mark_unchanged();
        stored.mark_unchanged();
        known.mark_unchanged();
        leaving.mark_unchanged();
        let looked = Instant::now();
        service.look(&mut healing, &mut copying).await;
        let is_pending = healing.is_pending() || service.mesh.is_unsettled();
        let rest = if is_pending { LOOK_EVERY } else { LOOK_AT_LEAST };
        // Changes come in showers; those that come together are looked at together.
        let stirred = async {
            let stirred = async {
                tokio::select! {
                    changed = changed.changed() => changed.is_ok(),
                    stored = stored.changed() => stored.is_ok(),
                    known = known.changed() => known.is_ok(),
                    leaving = leaving.changed() => leaving.is_ok(),
                }
            };
            let is_alive = timeout(rest, stirred).await.unwrap_or(true);
            sleep_until((looked + LOOK_EVERY).into()).await;
            is_alive
        };
        tokio::select! {
            () = service.stopping.cancelled() => return,
            Some(done) = copying.tasks.join_next(), if !copying.tasks.is_empty() => {
                service.ended(&mut healing, &mut copying, done.ok());
                while let Some(done) = copying.tasks.try_join_next() {
                    service.ended(&mut healing, &mut copying, done.ok());
                }
                sleep_until((looked + LOOK_AFTER_COPY).into()).await;
            }
            is_alive = stirred => if !is_alive { return },
        }
    }
}

impl Service {
    /// The objects that this node helps to keep, with their copies. With `since`, only holders that
    /// have spoken since then count.
    pub(super) fn counted(
        &self,
        objects: &BTreeMap<ShardId, Object>,
        since: Option<Instant>,
    ) -> Vec<Kept> {
        let list: Vec<(ShardId, u64, Replicas)> =
            objects.iter().map(|(shard, of)| (*shard, of.size, of.replicas)).collect();
        let mut all = self.mesh.copies(&list, since);
        for kept in &mut all {
            kept.is_here = self.disk.is_whole(kept.shard);
            kept.is_replica = self.disk.is_replica(kept.shard);
        }
        all
    }

    /// Looks at the swarm once, and does what the decider says.
    async fn look(self: &Arc<Self>, healing: &mut Healing, copying: &mut Copying) {
        let objects = self.kept_objects();
        let is_leaving = self.healer.leaves_since().is_some();
        let models: BTreeSet<ModelId> = objects.values().map(|object| object.model).collect();
        let helpers = self.mesh.helpers(models.iter().copied());
        let helps = self.healer.budget > 0 && !is_leaving;
        self.mesh.help(if helps { models } else { BTreeSet::new() });
        let mut counted = self.counted(&objects, None);
        for kept in &mut counted {
            let model = objects.get(&kept.shard).map(|object| object.model);
            kept.helpers = model.and_then(|model| helpers.get(&model).cloned());
        }
        let pinned = counted.iter().filter(|kept| kept.is_here && self.disk.is_pinned(kept.shard));
        self.mesh.pinned(pinned.map(|kept| kept.shard).collect());
        let volunteers = self.mesh.volunteers();
        let view = HealView {
            objects: &counted,
            volunteers: &volunteers,
            is_busy: self.mesh.is_busy(),
            is_leaving,
        };
        let own = self.mesh.peer_id();
        let spared = counted.iter().filter(|kept| kept.is_here && !kept.may_go(own));
        let spared: HashSet<ShardId> = spared.map(|kept| kept.shard).collect();
        if let Err(error) = self.disk.guard(spared).await {
            tracing::debug!(%error, "the store exceeds its budget");
        }
        let now = Instant::now();
        for action in healing.look(now, &view) {
            match action {
                HealAction::Copy { shard, size } if self.disk.room() < size => {
                    tracing::debug!(%shard, size, "no room for a copy");
                    healing.failed(now, shard);
                }
                // How many copies there are is not known here.
                HealAction::Copy { shard, .. }
                    if objects.get(&shard).is_some_and(|of| !self.mesh.follows(of.model)) =>
                {
                    healing.failed(now, shard);
                }
                HealAction::Copy { shard, size } => self.begin(copying, shard, size, &objects),
                HealAction::Stop(shard) => {
                    if let Some(handle) = copying.handles.remove(&shard) {
                        handle.abort();
                    }
                }
                HealAction::Drop(shard) => match self.disk.drop_copy(shard).await {
                    Ok(()) => self.healer.seen().status.dropped += 1,
                    Err(error) => tracing::warn!(%shard, %error, "a surplus copy stays"),
                },
            }
        }
        let room = if is_leaving { 0 } else { healing.room().min(self.disk.room()) };
        self.mesh.offer(Offer { room, is_leaving });
        self.note(now, &counted, &objects, healing, room);
    }

    /// Begins a copy in a task of its own.
    fn begin(
        self: &Arc<Self>,
        copying: &mut Copying,
        shard: ShardId,
        size: u64,
        objects: &BTreeMap<ShardId, Object>,
    ) {
        let model = objects.get(&shard).map(|object| object.model);
        let service = Arc::clone(self);
        let handle = copying.tasks.spawn(async move {
            let copied = service.copy(shard, size).await;
            if let (Ok(()), Some(model)) = (&copied, model) {
                if service.declined.has(model) {
                    // It was removed in the meantime.
                    let _ = service.disk.drop_copy(shard).await;
                } else {
                    // Who signed it is to be known when the swarm has been restarted.
                    service.keep_signers(model);
                }
            }
            (shard, copied.map(|()| size))
        });
        copying.handles.insert(shard, handle);
    }

    /// Call when a copy has ended; `None` if it was stopped or panicked.
    fn ended(
        &self,
        healing: &mut Healing,
        copying: &mut Copying,
        done: Option<(ShardId, anyhow::Result<u64>)>,
    ) {
        let Some((shard, copied)) = done else { return };
        copying.handles.remove(&shard);
        match copied {
            Ok(size) => {
                tracing::info!(%shard, size, "copied: the swarm had too few copies");
                healing.copied(shard);
                let mut seen = self.healer.seen();
                seen.status.copied += 1;
                seen.status.copied_bytes += size;
            }
            Err(error) => {
                tracing::info!(%shard, "a copy failed and is tried again: {error:#}");
                healing.failed(Instant::now(), shard);
            }
        }
    }

    /// Copies a whole object and keeps it as a replica.
    async fn copy(&self, shard: ShardId, size: u64) -> anyhow::Result<()> {
        let _hold = self.disk.hold([shard]);
        self.ladder.expect_sizes([(shard, size)]);
        let mut start = 0;
        while let Some(range) = ByteRange::new(start, (start + READ_BYTES).min(size)) {
            let (priority, deadline) = (Priority::Bulk, None);
            self.ladder.read(ReadRequest { shard, range, priority, deadline }).await?;
            start = range.end();
        }
        self.ladder.flush().await?;
        if !self.disk.is_whole(shard) && size <= READ_BYTES {
            // It came from RAM, or was not kept on arrival. The error says why not.
            self.fetch_whole(shard, size, None).await?;
        }
        ensure!(self.disk.is_whole(shard), "it could not be kept on disk");
        self.disk.set_replica(shard).await?;
        Ok(())
    }

    /// Publishes what a look saw.
    fn note(
        &self,
        now: Instant,
        counted: &[Kept],
        objects: &BTreeMap<ShardId, Object>,
        healing: &Healing,
        room: u64,
    ) {
        let mut seen = self.healer.seen();
        let mut by_model: BTreeMap<ModelId, (usize, u64)> = BTreeMap::new();
        let (mut lacking, mut lost, mut lacking_bytes, mut replica_bytes) = (0, 0, 0u64, 0);
        for kept in counted {
            replica_bytes += if kept.is_replica { kept.size } else { 0 };
            let copies = kept.holders.len() + usize::from(kept.is_here);
            let missing = kept.replicas.min.saturating_sub(copies);
            if missing == 0 {
                continue;
            }
            let bytes = kept.size.saturating_mul(missing as u64);
            lacking += 1;
            lost += usize::from(copies == 0);
            lacking_bytes = lacking_bytes.saturating_add(bytes);
            if let Some(object) = objects.get(&kept.shard) {
                let of_model = by_model.entry(object.model).or_default();
                *of_model = (of_model.0 + 1, of_model.1.saturating_add(bytes));
            }
        }
        seen.under_way = healing.under_way().collect();
        let size = |shard: &ShardId| objects.get(shard).map_or(0, |object| object.size);
        let progress = seen.progress(now, lacking_bytes);
        seen.by_model = by_model;
        let under_way_bytes = seen.under_way.iter().map(size).sum();
        let HealStatus { copied, copied_bytes, dropped, .. } = seen.status;
        seen.status = HealStatus {
            budget: self.healer.budget,
            replica_bytes,
            room,
            lacking,
            lost,
            lacking_bytes,
            under_way: seen.under_way.len(),
            under_way_bytes,
            copied,
            copied_bytes,
            dropped,
            rate: progress.rate,
            left_s: progress.left_s,
            is_leaving: false,
        };
    }

    /// The peers that hold an object whole and count as holders, and this node if it does.
    pub(super) fn holders_of(&self, kept: &Kept) -> Vec<PeerId> {
        let own = kept.is_here.then(|| self.mesh.peer_id());
        own.into_iter().chain(kept.holders.iter().copied()).collect()
    }
}

impl Seen {
    /// How what is lacking shrinks.
    fn progress(&mut self, now: Instant, lacking: u64) -> Progress {
        if lacking == 0 {
            self.meter = None;
            return Progress::default();
        }
        let is_new = self.meter.as_ref().is_none_or(|(_, total)| lacking > *total);
        if is_new {
            self.meter = Some((Meter::new(now, lacking), lacking));
        }
        let Some((meter, total)) = &mut self.meter else { return Progress::default() };
        meter.note(now, *total - lacking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_what_is_lacking() {
        let start = Instant::now();
        let mut seen = Seen::default();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(seen.progress(at(0), 0), Progress::default());
        assert_eq!(seen.progress(at(1), 1000).rate, None);
        let half = seen.progress(at(3), 600);
        assert_eq!((half.rate, half.left_s), (Some(200.0), Some(3.0)));
        // More is lost meanwhile: it is measured anew.
        assert_eq!(seen.progress(at(4), 5000).rate, None);
        assert_eq!(seen.progress(at(6), 3000).left_s, Some(3.0));
        seen.progress(at(7), 0);
        assert!(seen.meter.is_none());
    }
}
