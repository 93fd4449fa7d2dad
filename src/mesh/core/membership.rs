//! Who holds what: bitmaps of peers' holdings under leases, resolved against
//! the object lists of the models known here. Pure: the time is an argument.
//!
//! The rule for what a holdings entry says:
//! - bit i of an entry is object i of the model's registered list, which is the
//!   manifest's shards in order, then the other files it names by hash (the
//!   tokenizer): every object but the manifest has a bit;
//! - an object held in part has its place in that list and a bit for each 1 MiB chunk;
//! - the manifest, which names the list and so cannot be in it, has a flag.
//!
//! A bitmap that arrives before the model is registered is kept as it is: it is
//! resolved when somebody asks, so registering later needs no second message.
//! Invariant: what a lease no longer covers is never reported.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::TooMany;
use super::limits::{
    BEAT_GRACE, FORGOTTEN_FOR, HOLDINGS_MAX, MEMBER_BYTES_MAX, MEMBER_MODELS_MAX, MEMBER_PARTS_MAX,
    MEMBERS_MAX, MODELS_MAX, PEERS_REMEMBERED_MAX, VIEW_FAIR_MIN, VIEW_LOOK, VIEW_TURNS,
};
use super::peers::PeerMap;
use super::planted::{self, Plant};
use crate::wire::{BITMAP_BYTES_MAX, Holdings, ModelHoldings, Stamp};
use doppler_store::groups::Chunks;
use doppler_store::{ModelId, ShardId};

/// The result of a holdings message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Older than what is known; ignored.
    Stale,
    /// Nothing but the lease is new.
    Renewed,
    Changed,
    /// No room for another peer.
    Full,
}

/// What a peer says that it holds of a model.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Held {
    /// It copies objects of the model that too few hold.
    helps: bool,
    /// Everything that it holds of the model is pinned there.
    pins: bool,
    manifest: bool,
    objects: Vec<u8>,
    /// By index in the list.
    parts: BTreeMap<u32, Chunks>,
    /// What it keeps reading from others, by index.
    hot: BTreeSet<u32>,
}

impl From<&ModelHoldings> for Held {
    fn from(said: &ModelHoldings) -> Self {
        let parts = said.parts.iter().filter(|part| !part.chunks.is_none());
        Self {
            helps: said.helps,
            pins: said.pins,
            manifest: said.manifest,
            objects: said.objects.clone(),
            parts: parts.map(|part| (part.object, part.chunks)).collect(),
            hot: said.hot.iter().copied().collect(),
        }
    }
}

impl Held {
    /// Whether a message says just this. Parts and hot objects may be named in any order, and twice.
    fn is(&self, said: &ModelHoldings) -> bool {
        let is_plain = said.parts.is_empty() && said.hot.is_empty();
        if !is_plain {
            return *self == Self::from(said);
        }
        (self.helps, self.pins, self.manifest) == (said.helps, said.pins, said.manifest)
            && self.parts.is_empty()
            && self.hot.is_empty()
            && self.objects == said.objects
    }

    /// Whether anything of the model itself is held. The manifest does not count.
    fn has_objects(&self) -> bool {
        !self.parts.is_empty() || self.objects.iter().any(|byte| *byte != 0)
    }

    /// Everything that it holds of the model is pinned there.
    pub(super) const fn pins(&self) -> bool {
        self.pins
    }

    pub(super) const fn has_manifest(&self) -> bool {
        self.manifest
    }

    pub(super) fn has_whole(&self, bit: usize) -> bool {
        has_bit(&self.objects, bit)
    }

    /// Whether it keeps reading an object from others.
    pub(super) fn is_hot(&self, bit: usize) -> bool {
        !self.hot.is_empty() && u32::try_from(bit).is_ok_and(|bit| self.hot.contains(&bit))
    }

    pub(super) fn chunks(&self, bit: usize) -> Chunks {
        if has_bit(&self.objects, bit) {
            return Chunks::ALL;
        }
        let part = u32::try_from(bit).ok().and_then(|bit| self.parts.get(&bit));
        part.copied().unwrap_or_default()
    }
}

struct Entry {
    held: Held,
    until: Instant,
}

struct Member {
    /// Of its newest message.
    stamp: Stamp,
    /// When it last sent something new, and last its holdings; when the lease of those ends,
    /// whatever they named; and within which time it promised to speak again (zero: it did not).
    heard: Instant,
    told: Instant,
    until: Instant,
    next: Duration,
    /// The same of its last word on a model's topic, and when that came.
    near: Option<(Instant, Duration)>,
    /// Bytes that it would copy of objects that others lose.
    room: u64,
    /// It is about to leave the swarm.
    is_leaving: bool,
    /// Boxed, because an ordered map has room for eleven.
    models: BTreeMap<ModelId, Box<Entry>>,
}

impl Member {
    /// It speaks: on a model's topic, with a promise, or on the swarm's. Whoever speaks there while its word
    /// on the other is overdue has left that.
    fn speaks(&mut self, now: Instant, near: Option<Duration>) {
        match near {
            Some(next) => self.near = Some((now, next)).filter(|_| !next.is_zero()),
            None => self.near = self.near.filter(|(at, next)| now < *at + *next + BEAT_GRACE),
        }
    }

    /// Makes room for one model's entry by dropping those whose leases end first. Returns them.
    fn make_room(&mut self, model: ModelId, bytes: usize, parts: usize) -> Vec<ModelId> {
        self.models.remove(&model);
        let mut held: usize = self.models.values().map(|entry| entry.held.objects.len()).sum();
        let mut in_part: usize = self.models.values().map(|entry| entry.held.parts.len()).sum();
        let mut gone = Vec::new();
        while self.models.len() >= MEMBER_MODELS_MAX
            || held + bytes > MEMBER_BYTES_MAX
            || in_part + parts > MEMBER_PARTS_MAX
        {
            let Some((first, entry)) = self.take_first() else { break };
            held -= entry.held.objects.len();
            in_part -= entry.held.parts.len();
            gone.push(first);
        }
        gone
    }

    /// Removes the entry whose lease ends first.
    fn take_first(&mut self) -> Option<(ModelId, Box<Entry>)> {
        let first = self.models.iter().min_by_key(|(_, entry)| entry.until);
        let first = first.map(|(model, _)| *model)?;
        self.models.remove(&first).map(|entry| (first, entry))
    }
}

/// The last message of a peer whose lease has ended, or that said goodbye.
struct Forgotten {
    stamp: Stamp,
    until: Instant,
}

/// Peers' holdings and the lists that give them meaning.
#[derive(Default)]
pub(super) struct Membership {
    members: PeerMap<Member>,
    forgotten: PeerMap<Forgotten>,
    /// Which members have an entry for a model.
    by_model: BTreeMap<ModelId, BTreeSet<PeerId>>,
    /// Entries of all members.
    entries: usize,
    /// No lease ends before this, if any runs.
    soonest: Option<Instant>,
    /// Members that share no model, those that were silent for longest last, as of a look at all.
    turns: Vec<(Instant, PeerId)>,
    /// Nobody who shares no model gives way before this to another of that kind.
    next_turn: Option<Instant>,
    /// All members share a model, as of a look that is not repeated before this.
    all_share_until: Option<Instant>,
    /// In a crowd, the models whose holders have priority; all registered ones if it is empty.
    cared: BTreeSet<ModelId>,
    /// No member that shares a model gives way before this to one that shares a rarer one.
    next_fair_turn: Option<Instant>,
    lists: BTreeMap<ModelId, Vec<ShardId>>,
    /// The models' lists that contain an object, and its bit in each.
    places: BTreeMap<ShardId, Vec<(ModelId, usize)>>,
}

impl Membership {
    /// Adds what `peer`, the author, says on the swarm's topic that it holds.
    #[cfg(test)]
    pub(super) fn hear(
        &mut self,
        now: Instant,
        peer: PeerId,
        holdings: impl Borrow<Holdings>,
    ) -> Heard {
        self.hear_on(now, peer, holdings, false)
    }

    /// Adds what `peer`, the author, says that it holds: on a model's topic, or on the swarm's.
    pub(super) fn hear_on(
        &mut self,
        now: Instant,
        peer: PeerId,
        holdings: impl Borrow<Holdings>,
        is_near: bool,
    ) -> Heard {
        let holdings = holdings.borrow();
        if !self.members.contains_key(&peer) && self.members.len() >= MEMBERS_MAX {
            self.expire(now);
            if self.members.len() >= MEMBERS_MAX && !self.give_way(now, holdings) {
                return Heard::Full;
            }
        }
        let member = self.members.entry(peer).or_insert_with(|| Member {
            stamp: Stamp::default(),
            heard: now,
            told: now,
            until: now,
            next: Duration::ZERO,
            near: None,
            room: 0,
            is_leaving: false,
            models: BTreeMap::new(),
        });
        if holdings.stamp <= member.stamp && !planted::is(Plant::EpochOrder) {
            return Heard::Stale;
        }
        member.stamp = holdings.stamp;
        let mut changed = member.is_leaving != holdings.is_leaving;
        member.speaks(now, is_near.then_some(holdings.next));
        (member.heard, member.told) = (now, now);
        if !is_near {
            member.next = holdings.next;
        }
        (member.room, member.is_leaving) = (holdings.room, holdings.is_leaving);
        let lease = match planted::is(Plant::LeaseExpiry) {
            true => Duration::from_secs(3600),
            false => holdings.lease,
        };
        let until = now + lease;
        member.until = until;
        self.soonest = Some(self.soonest.map_or(until, |soonest| soonest.min(until)));
        for said in &holdings.models {
            let Some(member) = self.members.get_mut(&peer) else { break };
            let model = said.model;
            let old = member.models.get_mut(&model);
            // Mostly nothing is new.
            if let Some(old) = old.filter(|old| old.held.is(said)) {
                changed |= old.until <= now;
                old.until = until;
                continue;
            }
            changed = true;
            let held = Held::from(said);
            self.entries -= usize::from(member.models.contains_key(&model));
            let gone = member.make_room(model, held.objects.len(), held.parts.len());
            member.models.insert(model, Box::new(Entry { held, until }));
            self.entries += 1;
            self.by_model.entry(model).or_default().insert(peer);
            self.entries -= gone.len();
            for model in gone {
                unlink(&mut self.by_model, model, peer);
            }
            self.shed();
        }
        if changed { Heard::Changed } else { Heard::Renewed }
    }

    /// Makes room for a peer: of those that share no model with this node, the one that was silent
    /// for longest gives way, unless the newcomer shares none either and that one has just spoken.
    fn give_way(&mut self, now: Instant, holdings: &Holdings) -> bool {
        let shares = holdings.models.iter().any(|entry| self.is_cared_for(&entry.model));
        let is_shut = |turn: Option<Instant>| turn.is_some_and(|turn| now < turn);
        if !shares && (is_shut(self.all_share_until) || is_shut(self.next_turn)) {
            return false;
        }
        let stranger = if is_shut(self.all_share_until) { None } else { self.oldest_stranger() };
        let Some((told, oldest, stamp)) = stranger else {
            self.all_share_until =
                self.all_share_until.filter(|at| now < *at).or(Some(now + VIEW_LOOK));
            return shares && self.give_way_fairly(now, holdings);
        };
        if !shares && now < told + VIEW_TURNS {
            self.next_turn = Some(told + VIEW_TURNS);
            return false;
        }
        self.drop_member(oldest);
        self.remember(now, oldest, stamp);
        true
    }

    /// All members share a model with this node. If this peer shares one of which few are known, one gives
    /// way that shares only models of which many are: the one that was silent for longest.
    fn give_way_fairly(&mut self, now: Instant, holdings: &Holdings) -> bool {
        let fair = (MEMBERS_MAX / (self.cared.len() + 1)).max(VIEW_FAIR_MIN);
        let is_rare = |model: &ModelId| {
            self.is_cared_for(model) && self.by_model.get(model).map_or(0, BTreeSet::len) < fair
        };
        let is_due = self.next_fair_turn.is_none_or(|turn| turn <= now);
        if !is_due || !holdings.models.iter().any(|entry| is_rare(&entry.model)) {
            return false;
        }
        let common = self.members.iter().filter(|(_, member)| !member.models.keys().any(is_rare));
        let oldest = common.map(|(peer, member)| (member.told, *peer, member.stamp)).min();
        let Some((_, oldest, stamp)) = oldest else {
            self.next_fair_turn = Some(now + VIEW_LOOK);
            return false;
        };
        self.drop_member(oldest);
        self.remember(now, oldest, stamp);
        true
    }

    /// Sets the models whose holders have priority; none means all that are registered.
    pub(super) fn care_for(&mut self, models: BTreeSet<ModelId>) {
        if models != self.cared {
            self.cared = models;
            self.turns.clear();
            (self.all_share_until, self.next_fair_turn) = (None, None);
        }
    }

    fn is_cared_for(&self, model: &ModelId) -> bool {
        if self.cared.is_empty() {
            self.lists.contains_key(model)
        } else {
            self.cared.contains(model)
        }
    }

    /// The members that hold something of a model or help to keep it, in the order of their ids.
    pub(super) fn sharers(&self, model: ModelId) -> impl Iterator<Item = PeerId> {
        self.by_model.get(&model).into_iter().flatten().copied()
    }

    /// Whether a peer was heard on a model's topic, and its next word there is not overdue.
    pub(super) fn is_near(&self, now: Instant, peer: PeerId) -> bool {
        let near = self.members.get(&peer).and_then(|member| member.near);
        near.is_some_and(|(at, next)| now < at + next + BEAT_GRACE)
    }

    /// Of the members that share no model with this node, the one that was silent for longest: when it
    /// last said what it holds, and its last stamp. They are put in order once for many that give way.
    fn oldest_stranger(&mut self) -> Option<(Instant, PeerId, Stamp)> {
        let Self { members, lists, cared, turns, .. } = self;
        let is_shared = |model: &ModelId| match cared.is_empty() {
            true => lists.contains_key(model),
            false => cared.contains(model),
        };
        let is_stranger = |member: &Member| !member.models.keys().any(is_shared);
        // Whoever has spoken since then has a later turn.
        let is_due = |(told, peer): &(Instant, PeerId)| {
            members.get(peer).is_some_and(|member| member.told == *told && is_stranger(member))
        };
        while turns.last().is_some_and(|turn| !is_due(turn)) {
            turns.pop();
        }
        if turns.is_empty() {
            let strangers = members.iter().filter(|(_, member)| is_stranger(member));
            turns.extend(strangers.map(|(peer, member)| (member.told, *peer)));
            turns.sort_unstable_by(|one, other| other.cmp(one));
        }
        let (told, peer) = *turns.last()?;
        members.get(&peer).map(|member| (told, peer, member.stamp))
    }

    /// Removes a member and all that it holds. True if it was there.
    fn drop_member(&mut self, peer: PeerId) -> bool {
        let Some(member) = self.members.remove(&peer) else { return false };
        self.entries -= member.models.len();
        for model in member.models.into_keys() {
            unlink(&mut self.by_model, model, peer);
        }
        true
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// A peer says that it is there. True if that is news of a known peer.
    pub(super) fn beat(
        &mut self,
        now: Instant,
        peer: PeerId,
        stamp: Stamp,
        next: Duration,
    ) -> bool {
        let member = self.members.get_mut(&peer);
        let Some(member) =
            member.filter(|member| stamp > member.stamp || planted::is(Plant::EpochOrder))
        else {
            return false;
        };
        member.speaks(now, None);
        (member.stamp, member.heard, member.next) = (stamp, now, next);
        true
    }

    /// A peer says that it stops: it is forgotten, and so is all that it held. True if it was
    /// known.
    pub(super) fn part(&mut self, now: Instant, peer: PeerId, stamp: Stamp) -> bool {
        let is_old = self.members.get(&peer).is_some_and(|member| stamp <= member.stamp);
        if is_old && !planted::is(Plant::EpochOrder) {
            return false;
        }
        self.remember(now, peer, stamp);
        self.drop_member(peer)
    }

    /// Notes the last message of a peer that is forgotten, so that it is known when it is repeated.
    fn remember(&mut self, now: Instant, peer: PeerId, stamp: Stamp) {
        let known = self.forgotten.get(&peer);
        if known.is_some() || self.forgotten.len() < PEERS_REMEMBERED_MAX {
            let stamp = known.map_or(stamp, |last| last.stamp.max(stamp));
            let until = now + FORGOTTEN_FOR;
            self.forgotten.insert(peer, Forgotten { stamp, until });
            self.soonest = Some(self.soonest.map_or(until, |soonest| soonest.min(until)));
        }
    }

    /// Peers that promised to speak again by now, with `grace`, but have not. Those that were last
    /// heard before `since`, when this node itself was not awake, have their time from then on.
    pub(super) fn overdue(&self, now: Instant, since: Instant, grace: Duration) -> Vec<PeerId> {
        let is_overdue =
            |member: &Member| due_at(member, since).is_some_and(|due| now >= due + grace);
        let overdue = self.members.iter().filter(|(_, member)| is_overdue(member));
        overdue.map(|(peer, _)| *peer).collect()
    }

    /// When a peer's next word is due, if it is known and promised one.
    pub(super) fn due_at(&self, peer: PeerId, since: Instant) -> Option<Instant> {
        self.members.get(&peer).and_then(|member| due_at(member, since))
    }

    /// Beyond the bound over all peers, one model of the peer that names the most is forgotten.
    fn shed(&mut self) {
        while self.entries > HOLDINGS_MAX {
            let most = self.members.iter_mut();
            let most = most.max_by_key(|(peer, member)| (member.models.len(), **peer));
            let Some((peer, (model, _))) =
                most.and_then(|(peer, member)| Some((*peer, member.take_first()?)))
            else {
                return;
            };
            self.entries -= 1;
            unlink(&mut self.by_model, model, peer);
        }
    }

    /// Registers the object list that gives a model's bitmaps their meaning. Registering again
    /// replaces the list. There is always room for a `protected` model, this node's own or kept.
    pub(super) fn register(
        &mut self,
        model: ModelId,
        objects: Vec<ShardId>,
        protected: impl Fn(ModelId) -> bool,
    ) -> Result<(), TooMany> {
        let objects_max = BITMAP_BYTES_MAX * 8;
        if objects.len() > objects_max {
            return Err(TooMany { what: "objects of a model", max: objects_max });
        }
        if !self.lists.contains_key(&model)
            && self.lists.len() >= MODELS_MAX
            && !protected(model)
            && self.lists.keys().filter(|model| !protected(**model)).count() >= MODELS_MAX
        {
            return Err(TooMany { what: "registered models", max: MODELS_MAX });
        }
        self.unregister(model);
        for (bit, shard) in objects.iter().enumerate() {
            self.places.entry(*shard).or_default().push((model, bit));
        }
        self.lists.insert(model, objects);
        Ok(())
    }

    /// Forgets what a model's bitmaps mean.
    pub(super) fn unregister(&mut self, model: ModelId) {
        if let Some(old) = self.lists.remove(&model) {
            for shard in old {
                if let Some(places) = self.places.get_mut(&shard) {
                    places.retain(|(other, _)| *other != model);
                    if places.is_empty() {
                        self.places.remove(&shard);
                    }
                }
            }
        }
    }

    /// Whether the list of another model that satisfies the condition names the object, too.
    pub(super) fn is_shared(
        &self,
        model: ModelId,
        shard: ShardId,
        with: impl Fn(ModelId) -> bool,
    ) -> bool {
        let places = self.places.get(&shard).map_or(&[][..], Vec::as_slice);
        places.iter().any(|(other, _)| *other != model && with(*other))
    }

    /// A registered model's list.
    pub(super) fn list(&self, model: ModelId) -> Option<&[ShardId]> {
        self.lists.get(&model).map(Vec::as_slice)
    }

    /// The registered models and their lists.
    pub(super) fn lists(&self) -> impl Iterator<Item = (&ModelId, &[ShardId])> {
        self.lists.iter().map(|(model, list)| (model, list.as_slice()))
    }

    /// Peers with a running lease that hold the object or a part of it, and what they hold, in the
    /// order of their ids.
    pub(super) fn holders(&self, now: Instant, shard: ShardId) -> Vec<(PeerId, Chunks)> {
        let mut found: BTreeMap<PeerId, Chunks> = BTreeMap::new();
        for (peer, held) in self.entries_of(now, ModelId::from(*shard.as_bytes())) {
            if held.manifest {
                found.insert(peer, Chunks::ALL);
            }
        }
        for (model, bit) in self.places.get(&shard).map_or(&[][..], Vec::as_slice) {
            for (peer, held) in self.entries_of(now, *model) {
                let chunks = held.chunks(*bit);
                if !chunks.is_none() {
                    let known = found.entry(peer).or_insert(Chunks::NONE);
                    *known = known.or(chunks);
                }
            }
        }
        found.into_iter().collect()
    }

    /// The registered models whose lists name an object, and its bit in each.
    pub(super) fn places(&self, shard: ShardId) -> &[(ModelId, usize)] {
        self.places.get(&shard).map_or(&[][..], Vec::as_slice)
    }

    /// An object's place in a model's list.
    pub(super) fn place(&self, model: ModelId, shard: ShardId) -> Option<usize> {
        let places = self.places.get(&shard)?;
        places.iter().find(|(other, _)| *other == model).map(|(_, bit)| *bit)
    }

    /// What peers with a running lease said of a model, in the order of their ids.
    pub(super) fn entries_of(
        &self,
        now: Instant,
        model: ModelId,
    ) -> impl Iterator<Item = (PeerId, &Held)> {
        let peers = self.by_model.get(&model).into_iter().flatten();
        peers.filter_map(move |peer| {
            let entry = self.members.get(peer)?.models.get(&model)?;
            (entry.until > now).then_some((*peer, &entry.held))
        })
    }

    /// Peers with a running lease that hold the model or a part of it. Neither the manifest alone
    /// counts, because any peer that has heard of the model may have it, nor what other models
    /// have, too, unless nothing is missing.
    pub(super) fn holders_of_model(
        &self,
        now: Instant,
        model: ModelId,
    ) -> impl Iterator<Item = PeerId> {
        let peers = self.by_model.get(&model).into_iter().flatten().copied();
        peers.filter(move |peer| self.holds_of(now, model, *peer))
    }

    /// Whether a peer with a running lease holds the model or a part of it, as
    /// [`Self::holders_of_model`] counts it.
    pub(super) fn holds_of(&self, now: Instant, model: ModelId, peer: PeerId) -> bool {
        let entry = self.members.get(&peer).and_then(|member| member.models.get(&model));
        let Some(entry) = entry.filter(|entry| entry.until > now) else { return false };
        let held = &entry.held;
        held.has_objects()
            && self.lists.get(&model).is_none_or(|list| {
                let has = |bit: usize| !held.chunks(bit).is_none();
                let whole = |bit: usize| has_bit(&held.objects, bit);
                self.is_life_sign(model, list, has, whole)
            })
    }

    /// Whether objects of a model, given by their places in its list, are there for the sake of
    /// this model: one that no other registered model names, or all of them. The tokenizer that
    /// many models share keeps none of them alive.
    pub(super) fn is_life_sign(
        &self,
        model: ModelId,
        list: &[ShardId],
        has: impl Fn(usize) -> bool,
        whole: impl Fn(usize) -> bool,
    ) -> bool {
        let is_alone = |id: &ShardId| !self.is_shared(model, *id, |_| true);
        list.iter().enumerate().any(|(bit, id)| has(bit) && is_alone(id))
            || !list.is_empty() && (0..list.len()).all(whole)
    }

    /// The number of objects that a peer says it holds in full, including manifests.
    pub(super) fn held_by(&self, now: Instant, peer: PeerId) -> u64 {
        let Some(member) = self.members.get(&peer) else { return 0 };
        let running = member.models.values().filter(|entry| entry.until > now);
        running
            .map(|entry| {
                let held = &entry.held;
                let bits: u64 = held.objects.iter().map(|byte| u64::from(byte.count_ones())).sum();
                bits + u64::from(held.manifest)
            })
            .sum()
    }

    /// Peers with a running lease.
    pub(super) fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.members.keys().copied()
    }

    /// Members, and the bitmap bytes and partial objects of those that have most.
    pub(super) fn fill(&self) -> (usize, usize, usize) {
        let held = |member: &Member| {
            let bytes: usize = member.models.values().map(|entry| entry.held.objects.len()).sum();
            let parts: usize = member.models.values().map(|entry| entry.held.parts.len()).sum();
            (bytes, parts)
        };
        let most = self.members.values().map(held);
        let (bytes, parts) = most.fold((0, 0), |most, one| (most.0.max(one.0), most.1.max(one.1)));
        (self.members.len(), bytes, parts)
    }

    /// The bytes that each peer with a running lease would copy. Peers that offer nothing are left
    /// out. In a crowd, so are those that share no model with this node: of those, every node knows
    /// others.
    pub(super) fn offers(&self, now: Instant, is_crowd: bool) -> Vec<(PeerId, u64)> {
        let runs = |member: &Member| {
            member
                .models
                .iter()
                .any(|(model, entry)| entry.until > now && (!is_crowd || self.is_cared_for(model)))
        };
        let offers = self.members.iter().filter(|(_, member)| member.room > 0 && runs(member));
        let mut offers: Vec<(PeerId, u64)> =
            offers.map(|(peer, member)| (*peer, member.room)).collect();
        offers.sort_unstable();
        offers
    }

    /// Peers with a running lease that copy objects of a model that too few hold.
    pub(super) fn helpers(&self, now: Instant, model: ModelId) -> BTreeSet<PeerId> {
        let peers = self.by_model.get(&model).into_iter().flatten().copied();
        let helps = |peer: &PeerId| {
            let entry = self.members.get(peer).and_then(|member| member.models.get(&model));
            entry.is_some_and(|entry| entry.until > now && entry.held.helps)
        };
        peers.filter(helps).collect()
    }

    pub(super) fn is_leaving(&self, peer: PeerId) -> bool {
        self.members.get(&peer).is_some_and(|member| member.is_leaving)
    }

    /// When a peer last sent something new.
    pub(super) fn heard(&self, peer: PeerId) -> Option<Instant> {
        self.members.get(&peer).map(|member| member.heard)
    }

    /// When a peer last said what it holds.
    pub(super) fn told(&self, peer: PeerId) -> Option<Instant> {
        self.members.get(&peer).map(|member| member.told)
    }

    pub(super) fn forgotten(&self) -> usize {
        self.forgotten.len()
    }

    /// Entries of all members, and of the member with the most.
    pub(super) fn entries(&self) -> (usize, usize) {
        let most = self.members.values().map(|member| member.models.len()).max();
        (self.entries, most.unwrap_or(0))
    }

    pub(super) fn knows(&self, peer: PeerId) -> bool {
        self.members.contains_key(&peer)
    }

    /// Records that a peer said it does not hold an object, which is believed until its next
    /// message.
    pub(super) fn retract(&mut self, peer: PeerId, shard: ShardId) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        if let Some(entry) = member.models.get_mut(&ModelId::from(*shard.as_bytes())) {
            entry.held.manifest = false;
        }
        for (model, bit) in self.places.get(&shard).map_or(&[][..], Vec::as_slice) {
            let Some(entry) = member.models.get_mut(model) else { continue };
            if let Some(byte) = entry.held.objects.get_mut(bit / 8) {
                *byte &= !(1 << (bit % 8));
            }
            if let Ok(bit) = u32::try_from(*bit) {
                entry.held.parts.remove(&bit);
            }
        }
    }

    /// Whether a message is no newer than the last one of a peer that was forgotten. Gossip
    /// remembers messages for a short time only, and anybody may repeat a signed one, so a dead
    /// peer would seem alive again.
    pub(super) fn is_repeated(&self, now: Instant, peer: PeerId, stamp: Stamp) -> bool {
        let last = self.forgotten.get(&peer).filter(|last| last.until > now);
        last.is_some_and(|last| stamp <= last.stamp) && !planted::is(Plant::EpochOrder)
    }

    /// Drops what no lease covers any more. True if there was anything.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        if self.soonest.is_none_or(|soonest| soonest > now) {
            return false;
        }
        let before = self.entries;
        let (mut gone, mut next) = (Vec::new(), None::<Instant>);
        let Self { members, forgotten, by_model, entries, .. } = self;
        forgotten.retain(|_, last| last.until > now);
        members.retain(|peer, member| {
            member.models.retain(|model, entry| {
                let runs = entry.until > now;
                if !runs {
                    *entries -= 1;
                    unlink(by_model, *model, *peer);
                }
                runs
            });
            let is_over = member.until <= now && member.models.is_empty();
            if is_over {
                gone.push((*peer, member.stamp));
                return false;
            }
            let ends = member.models.values().map(|entry| entry.until);
            let ends = ends.chain((member.until > now).then_some(member.until));
            next = next.into_iter().chain(ends).min();
            true
        });
        // What is forgotten for good is looked at with the rest.
        next = next.into_iter().chain(forgotten.values().map(|last| last.until)).min();
        self.soonest = next;
        gone.sort_unstable();
        for (peer, stamp) in gone {
            self.remember(now, peer, stamp);
        }
        self.entries != before
    }
}

/// When a member's next word is due, if it promised one: on whichever topic that is sooner.
fn due_at(member: &Member, since: Instant) -> Option<Instant> {
    let far = (!member.next.is_zero()).then(|| member.heard.max(since) + member.next);
    let near = member.near.map(|(at, next)| at.max(since) + next);
    near.into_iter().chain(far).min()
}

fn unlink(by_model: &mut BTreeMap<ModelId, BTreeSet<PeerId>>, model: ModelId, peer: PeerId) {
    if let Some(peers) = by_model.get_mut(&model) {
        peers.remove(&peer);
        if peers.is_empty() {
            by_model.remove(&model);
        }
    }
}

fn has_bit(bitmap: &[u8], bit: usize) -> bool {
    bitmap.get(bit / 8).is_some_and(|byte| byte & (1 << (bit % 8)) != 0)
}

/// A bitmap with bit i set where `held(i)`, without trailing zero bytes.
pub(super) fn bitmap(len: usize, held: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut bytes = vec![0u8; len.div_ceil(8)];
    for bit in (0..len).filter(|bit| held(*bit)) {
        bytes[bit / 8] |= 1 << (bit % 8);
    }
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
