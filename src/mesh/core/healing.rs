//! Who copies what, so that every object of a model keeps its copies; and which copies may go.
//!
//! There is no leader. Every node looks at the same holdings, orders the others by rendezvous
//! hashing and finds out whether it is among those that should copy an object. A node that is,
//! and does not, is waited for; then the next one takes its place. What was lost at once is spread
//! over all survivors, and each copies its share from all holders.
//!
//! Owns what this node copies and when. Refuses to read or to delete anything itself.
//! Invariants: copies made here and on their way stay within the budget; nothing is done after
//! one look; a copy that is among the `min` best placed is never let go, so that nodes that see
//! the same never drop the last one together.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use doppler_ids::{PeerId, ShardId};

use super::Core;
use super::limits::{
    DRAIN_CONFIRM, DRAIN_PATIENCE, HEAL_AT_ONCE, HEAL_CONFIRM, HEAL_JITTER, HEAL_LOOKS_MIN,
    HEAL_PATIENCE, HEAL_RETRY, HEAL_SURPLUS_AFTER,
};
use super::planted::{self, Plant};
use doppler_store::groups::Chunks;

/// How many live nodes should hold an object whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replicas {
    /// Fewer are too few.
    pub min: usize,
    /// More are not needed; no less than `min`.
    pub max: usize,
}

impl Default for Replicas {
    fn default() -> Self {
        Self { min: 2, max: 4 }
    }
}

/// An object whose copies are counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub shard: ShardId,
    /// Bytes.
    pub size: u64,
    pub replicas: Replicas,
    /// Live peers that hold it whole and stay.
    pub holders: Vec<PeerId>,
    /// This node holds it whole; and only because it was to copy it.
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

    /// Whether this node's copy may be evicted: enough others are better placed to keep theirs.
    pub fn may_go(&self, own: PeerId) -> bool {
        self.place(own) >= self.replicas.min
    }
}

/// What is seen of the swarm at one time.
#[derive(Debug, Clone, Copy)]
pub struct HealView<'a> {
    pub objects: &'a [Kept],
    /// Live peers that stay and copy what others lost, and the bytes that each has room for.
    pub volunteers: &'a [(PeerId, u64)],
    /// A token waits for bytes of a peer.
    pub is_busy: bool,
    /// This node is about to leave: it copies nothing.
    pub is_leaving: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealAction {
    /// Copy this object, and keep it as a replica.
    Copy { shard: ShardId, size: u64 },
    /// Its copies are back: give up.
    Stop(ShardId),
    /// There are more copies than are needed, and this node's is the one that may go.
    Drop(ShardId),
}

/// What a node gives to the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealOptions {
    /// Bytes of copies; 0 copies nothing.
    pub budget: u64,
    /// Bytes a second of copying, at most.
    pub rate: Option<u64>,
}

/// An object that has too few copies.
#[derive(Debug, Clone, Copy)]
struct Lack {
    since: Instant,
    looks: u32,
}

/// What this node heals.
#[derive(Debug)]
pub struct Healing {
    own: PeerId,
    options: HealOptions,
    lacks: BTreeMap<ShardId, Lack>,
    surplus: BTreeMap<ShardId, Instant>,
    /// What is being copied, and its bytes.
    under_way: BTreeMap<ShardId, u64>,
    /// What failed is not tried again before this.
    failed: BTreeMap<ShardId, Instant>,
    /// The cap lets the next copy begin then.
    not_before: Option<Instant>,
    /// Bytes of copies that are here, at the last look.
    held: u64,
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
        }
    }

    /// Bytes that others may count on.
    pub fn room(&self) -> u64 {
        let coming: u64 = self.under_way.values().sum();
        self.options.budget.saturating_sub(self.held + coming)
    }

    /// What is being copied.
    pub fn under_way(&self) -> impl Iterator<Item = ShardId> {
        self.under_way.keys().copied()
    }

    /// Objects that have too few copies, by the last look.
    pub fn lacking(&self) -> usize {
        self.lacks.len()
    }

    /// A copy is here, and durable.
    pub fn copied(&mut self, shard: ShardId) {
        let size = self.under_way.remove(&shard);
        self.held += size.unwrap_or(0);
    }

    /// A copy did not come.
    pub fn failed(&mut self, now: Instant, shard: ShardId) {
        if self.under_way.remove(&shard).is_some() {
            self.failed.insert(shard, now + HEAL_RETRY);
        }
    }

    /// Whether a node that has said since then that it leaves may go. `objects` count only who has
    /// spoken since: of nodes that leave together none counts on one that began before it.
    /// It never takes a last copy along, and leaves too few behind only after a while.
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

    /// Looks at the swarm. To be called every second or so.
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
        actions
    }

    /// Counts an object's copies: notes a lack, lets a surplus go, stops what is not needed.
    fn count(&mut self, now: Instant, kept: &Kept, actions: &mut Vec<HealAction>) {
        let shard = kept.shard;
        let copies = kept.copies();
        if copies >= kept.replicas.min || copies == 0 {
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

    /// Begins to copy what this node should, the rarest first.
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
        // Whoever should have copied it and has not is not counted on for ever.
        let patience = HEAL_PATIENCE.as_millis().max(1);
        let late = usize::try_from(waited.as_millis() / patience).unwrap_or(usize::MAX);
        let wanted = kept.replicas.min.saturating_sub(kept.copies()).saturating_add(late);
        let weight = weight(own, shard);
        let better = volunteers.iter().filter(|(peer, room)| {
            *room >= kept.size
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
    /// An object as healing sees it. Who was disconnected for a while, is about to leave, or is
    /// not believed is no holder; with `since`, neither is who has not spoken since then.
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
        let holders = self.membership.holders(now, shard).into_iter();
        let holders =
            holders.filter(|(peer, chunks)| *chunks == Chunks::ALL && stays(*peer)).map(|h| h.0);
        let (holders, is_here) = (holders.collect(), self.whole.contains(&shard));
        Kept { shard, size, replicas, holders, is_here, is_replica: false }
    }

    /// Live peers that stay and offer room for copies, and how many bytes.
    pub fn volunteers(&self, now: Instant) -> Vec<(PeerId, u64)> {
        let offers = self.membership.offers(now).into_iter();
        offers.filter(|(peer, _)| *peer != self.config.own && self.stays(now, *peer)).collect()
    }

    /// Whether a peer is a live one that holds something and stays.
    pub fn counts_on(&self, now: Instant, peer: PeerId) -> bool {
        self.membership.held_by(now, peer) > 0 && self.stays(now, peer)
    }

    /// Whether a peer counts for what it says it holds and offers.
    fn stays(&self, now: Instant, peer: PeerId) -> bool {
        !self.membership.is_leaving(peer)
            && !self.reputation.is_shunned(now, peer)
            && !self.is_missing(now, peer)
    }

    /// Whether a peer's connection was lost and it has not spoken since.
    fn is_missing(&self, now: Instant, peer: PeerId) -> bool {
        let silence = self.config.timing.announce_every * 3 / 2;
        let silent_at = self.membership.heard(peer).map_or(now, |heard| heard + silence);
        self.absence.is_missing(now, peer, silent_at)
    }
}

/// Where a peer stands for an object: higher is better.
fn weight(peer: PeerId, shard: ShardId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(peer.as_bytes());
    hasher.update(shard.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Whether a peer stands better than this node, whose weight is given.
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
