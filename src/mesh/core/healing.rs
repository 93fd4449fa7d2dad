//! Which node copies which object, so that every object of a model keeps enough copies, and which
//! copies may be dropped.
//!
//! There is no leader. Every node looks at the same holdings, orders the others by rendezvous
//! hashing and determines whether it is among those that should copy an object. If a node that
//! should copy does not, the others wait for a while; then the next one takes its place. The
//! objects that one node held are spread over all survivors, and each survivor copies its share
//! from all holders.
//!
//! An object that peers keep reading from others is hot: one copy more for each of them, up to the
//! maximum. These copies cost only room that nobody needs. When the object cools down they stay
//! where they are, and go when a lack needs their room; so copies do not come and go with the
//! heat.
//!
//! Owns what this node copies and when. Never reads or deletes anything itself. Invariants: copies
//! that are here or on their way stay within the budget; no copy is begun or dropped after a single
//! look; a copy that is among the `min` best placed is never dropped, so nodes that see the same
//! swarm never drop the last copy together; a lack comes before every hot object.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{ModelId, PeerId, ShardId};

use super::Core;
use super::gossip::Due;
use super::limits::{
    CROWD, DRAIN_CONFIRM, DRAIN_PATIENCE, HEAL_AT_ONCE, HEAL_BYTES_AT_ONCE, HEAL_CONFIRM,
    HEAL_HOT_AFTER, HEAL_JITTER, HEAL_LOOKS_MIN, HEAL_PACE_MIN, HEAL_PATIENCE, HEAL_RETRY,
    HEAL_SMALL_AT_ONCE, HEAL_SURPLUS_AFTER,
};
use super::planted::{self, Plant};
use super::reads::Reading;
use doppler_store::Replicas;

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
    /// Peers, including this node, that keep reading it from others.
    pub heat: usize,
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

    /// The number of copies that it should have now.
    pub fn wanted(&self) -> usize {
        let Replicas { min, max } = self.replicas;
        min.saturating_add(self.heat).min(max).max(min)
    }

    /// Whether it has fewer copies than it must have, however cold it is.
    fn lacks(&self) -> bool {
        self.copies() < self.replicas.min
    }

    /// Whether this node's copy is a replica that is not wanted now.
    fn is_spare(&self, own: PeerId) -> bool {
        self.is_replica && self.place(own) >= self.wanted()
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
    /// Drop this node's copy: enough other holders are better placed.
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

/// An object that has fewer copies than it should.
#[derive(Debug, Clone, Copy)]
struct Lack {
    since: Instant,
    looks: u32,
    /// It is only hot; it has as many as it must have.
    is_mild: bool,
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
    /// Bytes of replicas here, as of the last look; and of those among them that are not wanted.
    held: u64,
    is_pending: bool,
    spare: u64,
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
            spare: 0,
        }
    }

    /// Bytes of further copies that other nodes may count on if they lack some.
    pub fn room(&self) -> u64 {
        self.free().saturating_add(self.spare)
    }

    /// Bytes of further copies without dropping any.
    fn free(&self) -> u64 {
        self.options.budget.saturating_sub(self.held.saturating_add(self.coming()))
    }

    /// Bytes of copies on their way.
    fn coming(&self) -> u64 {
        self.under_way.values().sum()
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
        let spare = view.objects.iter().filter(|kept| kept.is_spare(self.own));
        self.spare = spare.map(|kept| kept.size).sum();
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
        if copies >= kept.wanted() || copies + kept.leaving == 0 {
            self.lacks.remove(&shard);
        } else {
            let new = Lack { since: now, looks: 0, is_mild: !kept.lacks() };
            let lack = self.lacks.entry(shard).or_insert(new);
            // What was hot and is lacking now is confirmed anew.
            if lack.is_mild != new.is_mild {
                *lack = new;
            }
            lack.looks = lack.looks.saturating_add(1);
        }
        if kept.holders.len() >= kept.wanted() && self.under_way.remove(&shard).is_some() {
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
            self.let_go(kept, actions);
        }
    }

    fn let_go(&mut self, kept: &Kept, actions: &mut Vec<HealAction>) {
        self.held = self.held.saturating_sub(kept.size);
        self.spare = self.spare.saturating_sub(kept.size);
        actions.push(HealAction::Drop(kept.shard));
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
        chosen.sort_unstable_by_key(|(copies, weight, kept)| {
            (!kept.lacks(), *copies, *weight, kept.shard)
        });
        let mut spare = self.spares(view, actions);
        let mut spare_bytes: u64 = spare.iter().map(|kept| kept.size).sum();
        for (_, _, kept) in chosen {
            if !self.may_begin(kept.size, view.is_busy) {
                break;
            }
            if self.not_before.is_some_and(|at| at > now) {
                break;
            }
            // Only a lack drives out what is not wanted.
            let spared = if kept.lacks() { spare_bytes } else { 0 };
            if kept.size > self.free().saturating_add(spared) {
                continue;
            }
            while kept.size > self.free()
                && let Some(other) = spare.pop()
            {
                spare_bytes -= other.size;
                self.surplus.remove(&other.shard);
                self.let_go(other, actions);
            }
            if let Some(rate) = self.options.rate {
                let seconds = kept.size as f64 / rate.max(1) as f64;
                let pause = Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0));
                self.not_before = Some(now + pause);
            }
            self.under_way.insert(kept.shard, kept.size);
            actions.push(HealAction::Copy { shard: kept.shard, size: kept.size });
        }
    }

    /// Replicas here that are not wanted, without those just dropped; the worst placed last.
    fn spares<'a>(&self, view: &HealView<'a>, actions: &[HealAction]) -> Vec<&'a Kept> {
        if self.spare == 0 {
            return Vec::new();
        }
        let is_left = |kept: &&Kept| !actions.contains(&HealAction::Drop(kept.shard));
        let spare = view.objects.iter().filter(|kept| kept.is_spare(self.own)).filter(is_left);
        let mut spare: Vec<&Kept> = spare.collect();
        spare.sort_unstable_by_key(|kept| (kept.place(self.own), kept.shard));
        spare
    }

    /// Whether one more object of this size may be copied beside those under way.
    fn may_begin(&self, size: u64, is_busy: bool) -> bool {
        let count = self.under_way.len();
        let is_small =
            count < HEAL_SMALL_AT_ONCE && self.coming().saturating_add(size) <= HEAL_BYTES_AT_ONCE;
        if is_busy { count == 0 } else { count < HEAL_AT_ONCE || is_small }
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
        let confirm = if kept.lacks() { HEAL_CONFIRM } else { HEAL_HOT_AFTER };
        if lack.looks < HEAL_LOOKS_MIN || waited < confirm + jitter(own, shard) {
            return false;
        }
        // Nodes that should have copied what is lacking are not waited for forever.
        let patience = HEAL_PATIENCE + Duration::from_millis(kept.size * 1000 / HEAL_PACE_MIN);
        let late = usize::try_from(waited.as_millis() / patience.as_millis().max(1));
        let late = if kept.lacks() { late.unwrap_or(usize::MAX) } else { 0 };
        // What is hot gets its further copies once nothing is lacking and it has stayed hot.
        let wanted = if kept.lacks() { kept.replicas.min } else { kept.wanted() };
        let wanted = wanted.saturating_sub(kept.copies()).saturating_add(late);
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
    /// said since then what it holds.
    pub fn kept(
        &self,
        now: Instant,
        (shard, size): (ShardId, u64),
        replicas: Replicas,
        since: Option<Instant>,
    ) -> Kept {
        self.lens(now, since).kept((shard, size), replicas)
    }

    /// Call when this node copies objects of these models, and of no others.
    pub(super) fn on_help(&mut self, now: Instant, models: BTreeSet<ModelId>) {
        if models != self.helped {
            self.helped = models;
            self.schedule.change(now, Due::Holdings);
            self.stir_topics(now);
        }
    }

    /// Call when these objects, and no others, are pinned here.
    pub(super) fn on_pinned(&mut self, now: Instant, pinned: BTreeSet<ShardId>) {
        if pinned != self.pinned {
            self.pinned = pinned;
            self.schedule.change(now, Due::Holdings);
            self.stir_topics(now);
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
        let offers = self.membership.offers(now, self.size() > CROWD).into_iter();
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
    pub(super) fn lives(&self, now: Instant, peer: PeerId) -> bool {
        !self.reputation.is_shunned(now, peer) && !self.is_missing(now, peer)
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
