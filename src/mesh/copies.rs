//! What healing needs to know of the swarm and tells it: copies, volunteers, this node's offer.
//!
//! Decides nothing. The lock on the core is held for a bounded number of objects at a time, so that
//! counting the copies of a large model delays no read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use doppler_ids::PeerId;

use super::core::{Event, Kept, Offer, Replicas};
use super::handle::MeshHandle;
use doppler_store::{ModelId, ShardId};

/// Objects looked up while the lock is held.
const LOOKED_UP_AT_ONCE: usize = 256;

impl MeshHandle {
    /// The copies of objects (each with its size in bytes), in the same order. `is_here` says what
    /// this node has announced. With `since`, only holders that have spoken since then count.
    pub fn copies(
        &self,
        objects: &[(ShardId, u64, Replicas)],
        since: Option<Instant>,
    ) -> Vec<Kept> {
        let mut all = Vec::with_capacity(objects.len());
        for some in objects.chunks(LOOKED_UP_AT_ONCE) {
            self.shared().look(|core, _| {
                let mut lens = core.lens(Instant::now(), since);
                let kept = |(shard, size, replicas): &(ShardId, u64, Replicas)| {
                    lens.kept((*shard, *size), *replicas)
                };
                all.extend(some.iter().map(kept));
            });
        }
        all
    }

    /// Live peers that are not leaving and copy what others lose, and the bytes that each has room
    /// for.
    pub fn volunteers(&self) -> Vec<(PeerId, u64)> {
        self.shared().look(|core, _| core.volunteers(Instant::now()))
    }

    /// Whether this node hears from all that share a model with it what they hold. In a very large swarm it
    /// does so of a bounded number of models.
    pub fn follows(&self, model: ModelId) -> bool {
        self.shared().look(|core, _| core.follows(model))
    }

    /// The peers that copy objects of each of these models that too few hold.
    pub fn helpers(
        &self,
        models: impl Iterator<Item = ModelId>,
    ) -> BTreeMap<ModelId, Arc<BTreeSet<PeerId>>> {
        let now = Instant::now();
        let of = |model| (model, self.shared().look(|core, _| Arc::new(core.helpers(now, model))));
        models.map(of).collect()
    }

    /// Says of which models, all of them, this node copies objects that too few hold.
    pub fn help(&self, models: BTreeSet<ModelId>) {
        self.shared().note(Event::Help(models));
    }

    /// Says what, everything, is pinned here.
    pub fn pinned(&self, shards: BTreeSet<ShardId>) {
        self.shared().note(Event::Pinned(shards));
    }

    /// Whether a token waits for bytes from a peer.
    pub fn is_busy(&self) -> bool {
        self.shared().look(|core, _| core.is_token_waiting())
    }

    /// Whether it may soon be known that a peer is missing, without any further event.
    pub fn is_unsettled(&self) -> bool {
        self.shared().look(|core, _| core.is_anybody_in_doubt())
    }

    /// Tells the swarm how many bytes of copies this node has room for, and whether it is about to
    /// leave.
    pub fn offer(&self, offer: Offer) {
        self.shared().note(Event::Offer(offer));
    }
}
