//! Which node copies which object, so that every object of a model keeps enough copies, and which
//! copies may be dropped.
//!
//! There is no leader. Every node looks at the same holdings, orders the others by rendezvous
//! hashing and determines whether it is among those that should copy an object. If a node that
//! should copy does not, the others wait for a while; then the next one takes its place. The
//! objects that one node held are spread over all survivors, and each survivor copies its share
//! from all holders.
//!
//! Owns what this node copies and when. Never reads or deletes anything itself. Invariants: copies
//! that are here or on their way stay within the budget; no copy is begun or dropped after a single
//! look; a copy that is among the `min` best placed is never dropped, so nodes that see the same
//! swarm never drop the last copy together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{ModelId, PeerId, ShardId};

use super::Core;
use super::gossip::Due;
use super::limits::{
    DRAIN_CONFIRM, DRAIN_PATIENCE, HEAL_AT_ONCE, HEAL_CONFIRM, HEAL_JITTER, HEAL_LOOKS_MIN,
    HEAL_PATIENCE, HEAL_RETRY, HEAL_SURPLUS_AFTER,
};
use super::planted::{self, Plant};
use super::reads::Reading;
use doppler_store::Replicas;
use doppler_store::groups::Chunks;

/// An object whose copies are counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub shard: ShardId,
    /// Bytes.
    pub size: u64,
    pub replicas: Replicas,
    /// Live peers that hold it whole and are not leaving.
    pub holders: Vec<PeerId>,
    /// The number of live peers that hold it whole, but are leaving. It can be copied from them.
    pub leaving: usize,
    /// The volunteers that copy it. `None`: all of them.
    pub helpers: Option<Arc<BTreeSet<PeerId>>>,
    /// Whether one of the holders has pinned it.
    pub is_pinned_elsewhere: bool,
    /// Whether this node holds it whole, and whether it does so only as a replica.
    pub is_here: bool,
    pub is_replica: bool,
}

impl Kept {
    fn copies(&self) -> usize {
        self.holders.len() + usize::from(self.is_here)
    }

    /// How many of the other holders are better placed than this node.
    fn place(&self, own: PeerId) -> usize {
        let weight = weight(own, self.shard);
        self.holders.iter().filter(|peer| outweighs(**peer, own, self.shard, weight)).count()
    }

    /// Whether this node's copy may be evicted. A replica may if enough others are better placed to
    /// keep theirs. What is here only because it was read may if a holder has pinned it or one is
    /// better placed, so that the cache of a small disk beside one publisher keeps changing.
    pub fn may_go(&self, own: PeerId) -> bool {
        match self.is_replica {
            true => self.place(own) >= self.replicas.min,
            false => self.is_pinned_elsewhere || self.place(own) > 0,
        }
    }
}

/// What a node sees of the swarm at one time.
#[derive(Debug, Clone, Copy)]
pub struct HealView<'a> {
    pub objects: &'a [Kept],
    /// Live peers that are not leaving and copy what others lose, and the bytes that each has room
    /// for.
    pub volunteers: &'a [(PeerId, u64)],
    /// A token waits for bytes from a peer.
    pub is_busy: bool,
    /// This node is about to leave and copies nothing.
    pub is_leaving: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealAction {
    /// Copy this object, and keep it as a replica.
    Copy { shard: ShardId, size: u64 },
    /// Stop copying: the object has enough copies again.
    Stop(ShardId),
    /// Drop this node's copy: the maximum of other holders are better placed.
    Drop(ShardId),
}

/// What a node contributes to healing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealOptions {
    /// Bytes of copies. 0: it copies nothing.
    pub budget: u64,
    /// Bytes per second of copying, at most.
    pub rate: Option<u64>,
}

/// An object that has too few copies.
#[derive(Debug, Clone, Copy)]
struct Lack {
    since: Instant,
    looks: u32,
}

/// The state of this node's healing.
#[derive(Debug)]
pub struct Healing {
    own: PeerId,
    options: HealOptions,
    lacks: BTreeMap<ShardId, Lack>,
    surplus: BTreeMap<ShardId, Instant>,
    /// The objects that are being copied, and their bytes.
    under_way: BTreeMap<ShardId, u64>,
    /// The earliest time for another attempt at each object whose copy failed.
    failed: BTreeMap<ShardId, Instant>,
    /// The earliest time at which the cap allows the next copy.
    not_before: Option<Instant>,
    /// Bytes of replicas here, as of the last look.
    held: u64,
    is_pending: bool,
}

impl Healing {
    pub const fn new(own: PeerId, options: HealOptions) -> Self {
        Self {
            own,
            options,
            lacks: BTreeMap::new(),
            surplus: BTreeMap::new(),
            under_way: BTreeMap::new(),
            failed: BTreeMap::new(),
            not_before: None,
            held: 0,
            is_pending: false,
        }
    }

    /// Bytes of further copies that other nodes may count on.
    pub fn room(&self) -> u64 {
        let coming: u64 = self.under_way.values().sum();
        self.options.budget.saturating_sub(self.held + coming)
    }

    /// The objects that are being copied.
    pub fn under_way(&self) -> impl Iterator<Item = ShardId> {
        self.under_way.keys().copied()
    }

    /// The number of objects that had too few copies at the last look.
    pub fn lacking(&self) -> usize {
        self.lacks.len()
    }

    /// Whether this node could copy or drop something soon, so that it has to look again even if
    /// nothing happens.
    pub const fn is_pending(&self) -> bool {
        self.is_pending
    }

    /// Call when a copy is here and durable.
    pub fn copied(&mut self, shard: ShardId) {
        let size = self.under_way.remove(&shard);
        self.held += size.unwrap_or(0);
    }

    /// Call when a copy failed.
    pub fn failed(&mut self, now: Instant, shard: ShardId) {
        if self.under_way.remove(&shard).is_some() {
            self.failed.insert(shard, now + HEAL_RETRY);
        }
    }

    /// Whether a node that announced at `since` that it is leaving may go. The holders in `objects`
    /// must have spoken since then, so that of nodes that leave together, none relies on one that
    /// began before it. A node never takes the last copy along, and leaves too few behind only
    /// after a while.
    pub fn may_leave(now: Instant, since: Instant, objects: &[Kept]) -> bool {
        if planted::is(Plant::Drain) {
            return true;
        }
        let here = || objects.iter().filter(|kept| kept.is_here);
        let is_thin = here().any(|kept| kept.holders.len() < kept.replicas.min);
        let is_last = here().any(|kept| kept.holders.is_empty());
        let is_patient = now < since + DRAIN_PATIENCE;
        now >= since + DRAIN_CONFIRM && !is_last && !(is_thin && is_patient)
    }

    /// Looks at the swarm and returns what to do. To be called about once a second.
    pub fn look(&mut self, now: Instant, view: &HealView<'_>) -> Vec<HealAction> {
        let replicas = view.objects.iter().filter(|kept| kept.is_replica);
        self.held = replicas.map(|kept| kept.size).sum();
        self.failed.retain(|_, retry| *retry > now);
        let mut actions = Vec::new();
        let known: BTreeMap<ShardId, &Kept> =
            view.objects.iter().map(|kept| (kept.shard, kept)).collect();
        self.lacks.retain(|shard, _| known.contains_key(shard));
        self.surplus.retain(|shard, _| known.contains_key(shard));
        for kept in known.values() {
            self.count(now, kept, &mut actions);
        }
        if !view.is_leaving {
            self.begin(now, view, &known, &mut actions);
        }
        let mine = |shard: &ShardId| {
            known.get(shard).is_some_and(|kept| !kept.is_here && kept.size <= self.room())
        };
        self.is_pending = !self.under_way.is_empty()
            || !self.surplus.is_empty()
            || !view.is_leaving && self.lacks.keys().any(mine);
        actions
    }

    /// Counts an object's copies: notes a lack, drops a surplus copy, and stops copying what is not
    /// needed.
    fn count(&mut self, now: Instant, kept: &Kept, actions: &mut Vec<HealAction>) {
        let shard = kept.shard;
        let copies = kept.copies();
        // What nobody holds cannot be copied.
        if copies >= kept.replicas.min || copies + kept.leaving == 0 {
            self.lacks.remove(&shard);
        } else {
            let lack = self.lacks.entry(shard).or_insert(Lack { since: now, looks: 0 });
            lack.looks = lack.looks.saturating_add(1);
        }
        if kept.holders.len() >= kept.replicas.min && self.under_way.remove(&shard).is_some() {
            actions.push(HealAction::Stop(shard));
        }
        let is_surplus = kept.is_replica && kept.place(self.own) >= kept.replicas.max;
        if !is_surplus {
            self.surplus.remove(&shard);
            return;
        }
        let since = *self.surplus.entry(shard).or_insert(now);
        if now >= since + HEAL_SURPLUS_AFTER + jitter(self.own, shard) {
            self.surplus.remove(&shard);
            self.held = self.held.saturating_sub(kept.size);
            actions.push(HealAction::Drop(shard));
        }
    }

    /// Begins to copy the objects that this node should copy, the rarest first.
    fn begin(
        &mut self,
        now: Instant,
        view: &HealView<'_>,
        known: &BTreeMap<ShardId, &Kept>,
        actions: &mut Vec<HealAction>,
    ) {
        let mut chosen: Vec<(usize, u64, &Kept)> = Vec::new();
        for (shard, lack) in &self.lacks {
            let Some(kept) = known.get(shard).filter(|kept| !kept.is_here) else { continue };
            let busy = self.under_way.contains_key(shard) || self.failed.contains_key(shard);
            if !busy && self.is_mine(now, lack, kept, view.volunteers) {
                chosen.push((kept.copies(), weight(self.own, *shard), kept));
            }
        }
        chosen.sort_unstable_by_key(|(copies, weight, kept)| (*copies, *weight, kept.shard));
        let at_once = if view.is_busy { 1 } else { HEAL_AT_ONCE };
        for (_, _, Kept { shard, size, .. }) in chosen {
            if self.under_way.len() >= at_once || self.not_before.is_some_and(|at| at > now) {
                break;
            }
            if *size > self.room() {
                continue;
            }
            if let Some(rate) = self.options.rate {
                let seconds = *size as f64 / rate.max(1) as f64;
                let pause = Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0));
                self.not_before = Some(now + pause);
            }
            self.under_way.insert(*shard, *size);
            actions.push(HealAction::Copy { shard: *shard, size: *size });
        }
    }

    /// Whether this node is among those that should copy an object now.
    fn is_mine(
        &self,
        now: Instant,
        lack: &Lack,
        kept: &Kept,
        volunteers: &[(PeerId, u64)],
    ) -> bool {
        let (own, shard) = (self.own, kept.shard);
        let waited = now.saturating_duration_since(lack.since);
        if lack.looks < HEAL_LOOKS_MIN || waited < HEAL_CONFIRM + jitter(own, shard) {
            return false;
        }
        // Nodes that should have copied it are not waited for forever.
        let patience = HEAL_PATIENCE.as_millis().max(1);
        let late = usize::try_from(waited.as_millis() / patience).unwrap_or(usize::MAX);
        let wanted = kept.replicas.min.saturating_sub(kept.copies()).saturating_add(late);
        let weight = weight(own, shard);
        let better = volunteers.iter().filter(|(peer, room)| {
            *room >= kept.size
                && kept.helpers.as_ref().is_none_or(|helpers| helpers.contains(peer))
                && !kept.holders.contains(peer)
                && outweighs(*peer, own, shard, weight)
        });
        if planted::is(Plant::HealerChoice) {
            return better.count() >= volunteers.len();
        }
        better.count() < wanted
    }
}

impl Core {
    /// An object as healing sees it. A peer that has been disconnected for a while, is about to
    /// leave, or is shunned does not count as a holder; with `since`, nor does one that has not
    /// spoken since then.
    pub fn kept(
        &self,
        now: Instant,
        (shard, size): (ShardId, u64),
        replicas: Replicas,
        since: Option<Instant>,
    ) -> Kept {
        let spoke = |peer: PeerId| {
            since.is_none_or(|since| self.membership.heard(peer).is_some_and(|at| at > since))
        };
        let stays = |peer: PeerId| peer != self.config.own && self.stays(now, peer) && spoke(peer);
        let all = self.membership.holders(now, shard).into_iter();
        let all: Vec<PeerId> =
            all.filter(|(_, chunks)| *chunks == Chunks::ALL).map(|(peer, _)| peer).collect();
        let leaves = |peer: &&PeerId| self.membership.is_leaving(**peer) && self.lives(now, **peer);
        let leaving = all.iter().filter(leaves).count();
        let holders: Vec<PeerId> = all.into_iter().filter(|peer| stays(*peer)).collect();
        let is_pinned_elsewhere = self.membership.is_pinned(now, shard, &holders);
        let is_here = self.whole.contains(&shard);
        Kept {
            shard,
            size,
            replicas,
            holders,
            leaving,
            helpers: None,
            is_pinned_elsewhere,
            is_here,
            is_replica: false,
        }
    }

    /// Call when this node copies objects of these models, and of no others.
    pub(super) fn on_help(&mut self, now: Instant, models: BTreeSet<ModelId>) {
        if models != self.helped {
            self.helped = models;
            self.schedule.change(now, Due::Holdings);
        }
    }

    /// Call when these objects, and no others, are pinned here.
    pub(super) fn on_pinned(&mut self, now: Instant, pinned: BTreeSet<ShardId>) {
        if pinned != self.pinned {
            self.pinned = pinned;
            self.schedule.change(now, Due::Holdings);
        }
    }

    /// The peers that copy objects of a model that too few hold.
    pub fn helpers(&self, now: Instant, model: ModelId) -> BTreeSet<PeerId> {
        self.membership.helpers(now, model)
    }

    /// Whether a read for which a token waits is in flight.
    pub fn is_token_waiting(&self) -> bool {
        self.reads.values().any(Reading::is_for_token)
    }

    /// Whether time alone may show that a peer is missing: one was lost or is doubted.
    pub fn is_anybody_in_doubt(&self) -> bool {
        self.absence.len() > 0
    }

    /// Live peers that are not leaving and offer room for copies, with their bytes.
    pub fn volunteers(&self, now: Instant) -> Vec<(PeerId, u64)> {
        let offers = self.membership.offers(now).into_iter();
        offers.filter(|(peer, _)| *peer != self.config.own && self.stays(now, *peer)).collect()
    }

    /// Whether a peer is alive, holds something and is not leaving.
    pub fn counts_on(&self, now: Instant, peer: PeerId) -> bool {
        self.membership.held_by(now, peer) > 0 && self.stays(now, peer)
    }

    /// Whether a peer's holdings and offers count.
    fn stays(&self, now: Instant, peer: PeerId) -> bool {
        !self.membership.is_leaving(peer) && self.lives(now, peer)
    }

    /// Whether a peer is neither missing nor shunned.
    fn lives(&self, now: Instant, peer: PeerId) -> bool {
        !self.reputation.is_shunned(now, peer) && !self.is_missing(now, peer)
    }

    /// Whether a peer's connection was lost and it has not spoken since.
    fn is_missing(&self, now: Instant, peer: PeerId) -> bool {
        let silence = self.config.timing.announce_every * 3 / 2;
        let silent_at = self.membership.heard(peer).map_or(now, |heard| heard + silence);
        self.absence.is_missing(now, peer, silent_at)
    }
}

/// A peer's rank for an object: higher is better placed.
fn weight(peer: PeerId, shard: ShardId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(peer.as_bytes());
    hasher.update(shard.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Whether a peer is better placed than this node, whose weight is given.
fn outweighs(peer: PeerId, own: PeerId, shard: ShardId, own_weight: u64) -> bool {
    (weight(peer, shard), peer) > (own_weight, own)
}

/// A wait that differs by node and object, below [`HEAL_JITTER`].
fn jitter(own: PeerId, shard: ShardId) -> Duration {
    HEAL_JITTER.mul_f64((weight(own, shard) % 1024) as f64 / 1024.0)
}

#[cfg(test)]
#[path = "healing_tests.rs"]
mod tests;
