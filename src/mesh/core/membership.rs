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

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::TooMany;
use super::limits::{
    FORGOTTEN_FOR, HOLDINGS_MAX, MEMBER_BYTES_MAX, MEMBER_MODELS_MAX, MEMBER_PARTS_MAX,
    MEMBERS_MAX, MODELS_MAX, PEERS_REMEMBERED_MAX,
};
use super::planted::{self, Plant};
use crate::wire::{BITMAP_BYTES_MAX, Holdings, ModelHoldings};
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

#[derive(Default, PartialEq, Eq)]
struct Held {
    /// It copies objects of the model that too few hold.
    helps: bool,
    /// Everything that it holds of the model is pinned there.
    pins: bool,
    manifest: bool,
    objects: Vec<u8>,
    /// By index in the list.
    parts: BTreeMap<u32, Chunks>,
}

impl Held {
    /// Whether anything of the model itself is held. The manifest does not count.
    fn has_objects(&self) -> bool {
        !self.parts.is_empty() || self.objects.iter().any(|byte| *byte != 0)
    }

    fn chunks(&self, bit: usize) -> Chunks {
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
    sequence: u64,
    /// When it last sent something new, and when the lease of that message ends, whatever it named.
    heard: Instant,
    until: Instant,
    /// Bytes that it would copy of objects that others lose.
    room: u64,
    /// It is about to leave the swarm.
    is_leaving: bool,
    models: BTreeMap<ModelId, Entry>,
}

impl Member {
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
    fn take_first(&mut self) -> Option<(ModelId, Entry)> {
        let first = self.models.iter().min_by_key(|(_, entry)| entry.until);
        let first = first.map(|(model, _)| *model)?;
        self.models.remove(&first).map(|entry| (first, entry))
    }
}

/// The last message of a peer whose lease has ended.
struct Forgotten {
    sequence: u64,
    until: Instant,
}

/// Peers' holdings and the lists that give them meaning.
#[derive(Default)]
pub(super) struct Membership {
    members: BTreeMap<PeerId, Member>,
    forgotten: BTreeMap<PeerId, Forgotten>,
    /// Which members have an entry for a model.
    by_model: BTreeMap<ModelId, BTreeSet<PeerId>>,
    /// Entries of all members.
    entries: usize,
    lists: BTreeMap<ModelId, Vec<ShardId>>,
    /// The models' lists that contain an object, and its bit in each.
    places: BTreeMap<ShardId, Vec<(ModelId, usize)>>,
}

impl Membership {
    /// Adds what `peer`, the author, says it holds.
    pub(super) fn hear(&mut self, now: Instant, peer: PeerId, holdings: Holdings) -> Heard {
        if !self.members.contains_key(&peer) && self.members.len() >= MEMBERS_MAX {
            self.expire(now);
            if self.members.len() >= MEMBERS_MAX {
                return Heard::Full;
            }
        }
        let member = self.members.entry(peer).or_insert_with(|| Member {
            sequence: 0,
            heard: now,
            until: now,
            room: 0,
            is_leaving: false,
            models: BTreeMap::new(),
        });
        if holdings.sequence <= member.sequence && !planted::is(Plant::EpochOrder) {
            return Heard::Stale;
        }
        member.sequence = holdings.sequence;
        let mut changed = member.is_leaving != holdings.is_leaving;
        (member.heard, member.room, member.is_leaving) = (now, holdings.room, holdings.is_leaving);
        let lease = match planted::is(Plant::LeaseExpiry) {
            true => Duration::from_secs(3600),
            false => holdings.lease,
        };
        let until = now + lease;
        member.until = until;
        for ModelHoldings { model, manifest, objects, parts, helps, pins } in holdings.models {
            let parts = parts.into_iter().filter(|part| !part.chunks.is_none());
            let parts = parts.map(|part| (part.object, part.chunks)).collect();
            let held = Held { helps, pins, manifest, objects, parts };
            let Some(member) = self.members.get_mut(&peer) else { break };
            let old = member.models.get(&model);
            changed |= old.is_none_or(|old| old.until <= now || old.held != held);
            self.entries -= usize::from(old.is_some());
            let gone = member.make_room(model, held.objects.len(), held.parts.len());
            member.models.insert(model, Entry { held, until });
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

    /// Beyond the bound over all peers, one model of the peer that names the most is forgotten.
    fn shed(&mut self) {
        while self.entries > HOLDINGS_MAX {
            let most = self.members.iter_mut().max_by_key(|(_, member)| member.models.len());
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

    /// The registered models and their lists.
    pub(super) fn lists(&self) -> impl Iterator<Item = (&ModelId, &[ShardId])> {
        self.lists.iter().map(|(model, list)| (model, list.as_slice()))
    }

    /// Peers with a running lease that hold the object or a part of it, and what they hold.
    pub(super) fn holders(&self, now: Instant, shard: ShardId) -> Vec<(PeerId, Chunks)> {
        let model = ModelId::from(*shard.as_bytes());
        let places = self.places.get(&shard).map_or(&[][..], Vec::as_slice);
        let chunks = |member: &Member| {
            let running = |model: &ModelId| {
                member.models.get(model).filter(|entry| entry.until > now).map(|entry| &entry.held)
            };
            if running(&model).is_some_and(|held| held.manifest) {
                return Chunks::ALL;
            }
            let of = |(model, bit): &(ModelId, usize)| {
                running(model).map_or(Chunks::NONE, |held| held.chunks(*bit))
            };
            places.iter().map(of).fold(Chunks::NONE, Chunks::or)
        };
        let holders = self.members.iter().map(|(peer, member)| (*peer, chunks(member)));
        holders.filter(|(_, chunks)| !chunks.is_none()).collect()
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
        let Some(Entry { held, .. }) = entry.filter(|entry| entry.until > now) else {
            return false;
        };
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
            .map(|Entry { held, .. }| {
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
    /// out.
    pub(super) fn offers(&self, now: Instant) -> Vec<(PeerId, u64)> {
        let runs = |member: &Member| member.models.values().any(|entry| entry.until > now);
        let offers = self.members.iter().filter(|(_, member)| member.room > 0 && runs(member));
        offers.map(|(peer, member)| (*peer, member.room)).collect()
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

    /// Whether one of these peers, with a running lease, holds an object whole and pins it.
    pub(super) fn is_pinned(&self, now: Instant, shard: ShardId, by: &[PeerId]) -> bool {
        let model = ModelId::from(*shard.as_bytes());
        let places = self.places.get(&shard).map_or(&[][..], Vec::as_slice);
        let pinned = |member: &Member| {
            let pinning = |model: &ModelId| {
                let entry = member.models.get(model).filter(|entry| entry.until > now);
                entry.map(|entry| &entry.held).filter(|held| held.pins)
            };
            pinning(&model).is_some_and(|held| held.manifest)
                || places.iter().any(|(model, bit)| {
                    pinning(model).is_some_and(|held| has_bit(&held.objects, *bit))
                })
        };
        by.iter().filter_map(|peer| self.members.get(peer)).any(pinned)
    }

    pub(super) fn is_leaving(&self, peer: PeerId) -> bool {
        self.members.get(&peer).is_some_and(|member| member.is_leaving)
    }

    /// When a peer last sent something new.
    pub(super) fn heard(&self, peer: PeerId) -> Option<Instant> {
        self.members.get(&peer).map(|member| member.heard)
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
    pub(super) fn is_repeated(&self, now: Instant, peer: PeerId, sequence: u64) -> bool {
        let last = self.forgotten.get(&peer).filter(|last| last.until > now);
        last.is_some_and(|last| sequence <= last.sequence) && !planted::is(Plant::EpochOrder)
    }

    /// Drops what no lease covers any more. True if there was anything.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = self.entries;
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
            if is_over && forgotten.len() < PEERS_REMEMBERED_MAX {
                let last = Forgotten { sequence: member.sequence, until: now + FORGOTTEN_FOR };
                forgotten.insert(*peer, last);
            }
            !is_over
        });
        self.entries != before
    }
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
mod tests {
    use super::*;
    use crate::wire::PartHoldings;

    const LEASE: Duration = Duration::from_secs(30);

    fn peer(byte: u8) -> PeerId {
        PeerId::from_seed([byte; 32])
    }

    fn says(sequence: u64, model: ModelId, manifest: bool, objects: &[u8]) -> Holdings {
        Holdings {
            peer: Vec::new(),
            sequence,
            lease: LEASE,
            room: 0,
            is_leaving: false,
            addresses: Vec::new(),
            models: vec![ModelHoldings {
                model,
                manifest,
                objects: objects.to_vec(),
                parts: Vec::new(),
                helps: false,
                pins: false,
            }],
            run: 0,
        }
    }

    fn register(members: &mut Membership, model: ModelId, objects: Vec<ShardId>) {
        members.register(model, objects, |_| false).unwrap();
    }

    fn whole(members: &Membership, now: Instant, shard: ShardId) -> Vec<PeerId> {
        let holders = members.holders(now, shard).into_iter();
        holders.filter(|(_, chunks)| *chunks == Chunks::ALL).map(|(peer, _)| peer).collect()
    }

    #[test]
    fn parts_of_objects_are_told_apart_from_whole_ones() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let objects: Vec<ShardId> = (0..3u8).map(|i| ShardId::of(&[i])).collect();
        let mut members = Membership::default();
        register(&mut members, model, objects.clone());
        let mut part = says(1, model, false, &[0b1]);
        part.models[0].parts = [(1, 0b101), (2, 0)]
            .map(|(object, chunks)| PartHoldings { object, chunks: Chunks(chunks) })
            .to_vec();
        assert_eq!(members.hear(now, peer(1), part.clone()), Heard::Changed);
        assert_eq!(members.holders(now, objects[0]), [(peer(1), Chunks::ALL)]);
        assert_eq!(members.holders(now, objects[1]), [(peer(1), Chunks(0b101))]);
        assert_eq!(members.holders(now, objects[2]), [], "no chunk at all");
        part.sequence = 2;
        assert_eq!(members.hear(now, peer(1), part.clone()), Heard::Renewed);
        members.retract(peer(1), objects[1]);
        assert_eq!(members.holders(now, objects[1]), []);
        // Many parts push out what ends first, and never add up to more than the bound.
        for sequence in 3..20u64 {
            let model = ModelId::of(&sequence.to_le_bytes());
            let mut many = says(sequence, model, false, &[]);
            let part = |object| PartHoldings { object, chunks: Chunks::ALL };
            many.models[0].parts = (0..500).map(part).collect();
            members.hear(now + Duration::from_millis(sequence), peer(1), many);
        }
        let parts: usize =
            members.members[&peer(1)].models.values().map(|entry| entry.held.parts.len()).sum();
        assert_eq!(parts, 1000);
        assert!(parts <= MEMBER_PARTS_MAX);
    }

    #[test]
    fn bitmaps_mean_something_once_the_list_is_registered() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let objects: Vec<ShardId> = (0..10u8).map(|i| ShardId::of(&[i])).collect();
        let mut members = Membership::default();
        assert_eq!(members.hear(now, peer(1), says(1, model, true, &[1, 2])), Heard::Changed);
        assert_eq!(whole(&members, now, objects[0]), []);
        assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
        register(&mut members, model, objects.clone());
        assert_eq!(whole(&members, now, objects[0]), [peer(1)]);
        assert_eq!(whole(&members, now, objects[9]), [peer(1)]);
        assert_eq!(whole(&members, now, objects[1]), []);
        assert_eq!(members.held_by(now, peer(1)), 3);
        assert_eq!(members.holders_of_model(now, model).collect::<Vec<_>>(), [peer(1)]);
        // A shorter list leaves no trace of the longer one.
        register(&mut members, model, objects[..1].to_vec());
        assert_eq!(whole(&members, now, objects[9]), []);
    }

    #[test]
    fn leases_end_and_renewals_and_stale_messages_are_told_apart() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let shard = ShardId::of(b"s");
        let mut members = Membership::default();
        register(&mut members, model, vec![shard]);
        members.hear(now, peer(1), says(5, model, false, &[1]));
        assert_eq!(members.hear(now, peer(1), says(5, model, false, &[0])), Heard::Stale);
        let half = now + LEASE / 2;
        assert_eq!(members.hear(half, peer(1), says(6, model, false, &[1])), Heard::Renewed);
        assert_eq!(whole(&members, half + LEASE - Duration::from_millis(1), shard), [peer(1)]);
        assert_eq!(whole(&members, half + LEASE, shard), [], "at the end of its lease");
        assert!(!members.expire(half + LEASE / 2));
        assert!(members.expire(half + LEASE));
        assert_eq!(members.peers().count(), 0);
        // A restarted peer whose clock went back is believed again once forgotten.
        assert_eq!(
            members.hear(half + LEASE, peer(1), says(1, model, false, &[1])),
            Heard::Changed
        );
    }

    #[test]
    fn what_a_forgotten_peer_said_before_is_not_news() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let mut members = Membership::default();
        members.hear(now, peer(1), says(5, model, false, &[1]));
        assert!(!members.is_repeated(now, peer(1), 5), "while its lease runs it is merely stale");
        let later = now + LEASE;
        assert!(members.expire(later));
        assert!(members.is_repeated(later, peer(1), 5) && members.is_repeated(later, peer(1), 4));
        assert!(!members.is_repeated(later, peer(1), 6) && !members.is_repeated(later, peer(2), 1));
        assert!(!members.is_repeated(later + FORGOTTEN_FOR, peer(1), 5));
        members.expire(later + FORGOTTEN_FOR);
        assert!(members.forgotten.is_empty());
    }

    #[test]
    fn a_denied_object_is_not_reported_until_the_next_message() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let shard = ShardId::of(b"s");
        let mut members = Membership::default();
        register(&mut members, model, vec![shard, shard]);
        members.hear(now, peer(1), says(1, model, true, &[0b11]));
        members.retract(peer(1), shard);
        members.retract(peer(2), shard);
        assert_eq!(whole(&members, now, shard), []);
        assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
        members.retract(peer(1), model.manifest());
        assert_eq!(whole(&members, now, model.manifest()), []);
        members.hear(now, peer(1), says(2, model, true, &[0b11]));
        assert_eq!(whole(&members, now, shard), [peer(1)]);
    }

    #[test]
    fn a_manifest_alone_makes_no_holder_of_the_model() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let mut members = Membership::default();
        members.hear(now, peer(1), says(1, model, true, &[0, 0]));
        assert_eq!(members.holders_of_model(now, model).count(), 0);
        members.hear(now, peer(1), says(2, model, true, &[0, 1]));
        assert_eq!(members.holders_of_model(now, model).collect::<Vec<_>>(), [peer(1)]);
        assert!(members.holds_of(now, model, peer(1)) && !members.holds_of(now, model, peer(2)));
        assert_eq!(members.holders_of_model(now + LEASE, model).count(), 0, "its lease has ended");
        members.hear(now, peer(1), says(3, model, true, &[]));
        assert_eq!(members.holders_of_model(now, model).count(), 0, "it was removed");
    }

    #[test]
    fn what_other_models_have_too_makes_no_holder_unless_it_is_all() {
        let (now, model, other) = (Instant::now(), ModelId::of(b"m"), ModelId::of(b"n"));
        let [own, shared] = [ShardId::of(b"weights"), ShardId::of(b"tokenizer")];
        let mut members = Membership::default();
        members.hear(now, peer(1), says(1, model, true, &[0b10]));
        members.hear(now, peer(2), says(1, model, true, &[0b01]));
        let holders = |members: &Membership| -> BTreeSet<PeerId> {
            members.holders_of_model(now, model).collect()
        };
        register(&mut members, model, vec![own, shared]);
        assert_eq!(holders(&members), BTreeSet::from([peer(1), peer(2)]));
        register(&mut members, other, vec![shared]);
        assert_eq!(holders(&members), BTreeSet::from([peer(2)]));
        assert_eq!(whole(&members, now, shared), [peer(1)], "it is found all the same");
        // The same weights under another name.
        register(&mut members, other, vec![own, shared]);
        assert_eq!(holders(&members), BTreeSet::new());
        members.hear(now, peer(2), says(2, model, true, &[0b11]));
        assert_eq!(holders(&members), BTreeSet::from([peer(2)]));
        members.unregister(other);
        assert_eq!(holders(&members), BTreeSet::from([peer(1), peer(2)]));
    }

    #[test]
    fn who_helps_with_a_model_is_known_while_its_lease_runs() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let mut members = Membership::default();
        let mut helps = says(1, model, false, &[]);
        helps.models[0].helps = true;
        members.hear(now, peer(1), helps.clone());
        members.hear(now, peer(2), says(1, model, true, &[1]));
        assert_eq!(members.helpers(now, model), BTreeSet::from([peer(1)]));
        assert_eq!(members.helpers(now, ModelId::of(b"n")), BTreeSet::new());
        assert_eq!(members.helpers(now + LEASE, model), BTreeSet::new());
        (helps.sequence, helps.models[0].helps) = (2, false);
        assert_eq!(members.hear(now, peer(1), helps), Heard::Changed);
        assert_eq!(members.helpers(now, model), BTreeSet::new());
    }

    #[test]
    fn an_object_is_pinned_where_all_that_is_held_of_its_model_is() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let objects = [ShardId::of(b"a"), ShardId::of(b"b")];
        let mut members = Membership::default();
        register(&mut members, model, objects.to_vec());
        let mut pins = says(1, model, true, &[0b01]);
        pins.models[0].pins = true;
        members.hear(now, peer(1), pins);
        members.hear(now, peer(2), says(1, model, true, &[0b11]));
        let is_pinned = |at, shard, by: &[PeerId]| members.is_pinned(at, shard, by);
        assert!(is_pinned(now, objects[0], &[peer(1), peer(2)]));
        assert!(is_pinned(now, model.manifest(), &[peer(1)]));
        assert!(!is_pinned(now, objects[1], &[peer(1), peer(2)]), "only cached");
        assert!(!is_pinned(now, objects[0], &[peer(2)]), "by somebody who does not count");
        assert!(!is_pinned(now + LEASE, objects[0], &[peer(1)]));
    }

    #[test]
    fn all_of_a_peers_models_are_believed() {
        let now = Instant::now();
        let mut members = Membership::default();
        let models: Vec<ModelId> = (0..300u16).map(|i| ModelId::of(&i.to_le_bytes())).collect();
        for (sequence, model) in models.iter().enumerate() {
            members.hear(now, peer(1), says(sequence as u64 + 1, *model, true, &[1]));
        }
        for model in models {
            assert_eq!(members.holders_of_model(now, model).count(), 1);
            assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
        }
    }

    #[test]
    fn memory_is_bounded() {
        let (now, model) = (Instant::now(), ModelId::of(b"m"));
        let mut members = Membership::default();
        let too_many = vec![ShardId::of(b"s"); BITMAP_BYTES_MAX * 8 + 1];
        assert!(members.register(model, too_many, |_| true).is_err());
        let number = |number: u64| ModelId::of(&number.to_le_bytes());
        for sequence in 1..=MEMBER_MODELS_MAX as u64 + 100 {
            let later = now + Duration::from_millis(sequence);
            members.hear(later, peer(1), says(sequence, number(sequence), true, &[]));
        }
        assert_eq!(members.held_by(now, peer(1)), MEMBER_MODELS_MAX as u64);
        // Over all peers: the peer that names the most loses the most.
        for other in 2..=40 {
            for sequence in 1..=900 {
                members.hear(now, peer(other), says(sequence, number(sequence), true, &[1]));
            }
        }
        members.hear(now, peer(99), says(1, model, true, &[1]));
        assert_eq!(members.holders_of_model(now, model).count(), 1);
        let count = |members: &Membership| -> usize {
            members.members.values().map(|member| member.models.len()).sum()
        };
        let linked =
            |members: &Membership| members.by_model.values().map(BTreeSet::len).sum::<usize>();
        assert_eq!(
            (count(&members), members.entries, linked(&members)),
            (HOLDINGS_MAX, HOLDINGS_MAX, HOLDINGS_MAX)
        );
        assert!(members.expire(now + LEASE * 2));
        assert_eq!((count(&members), members.entries, linked(&members)), (0, 0, 0));

        for index in 0..MODELS_MAX {
            register(&mut members, ModelId::of(&index.to_le_bytes()), Vec::new());
        }
        let more = ModelId::of(b"one more");
        assert!(members.register(more, Vec::new(), |_| false).is_err());
        // An own or kept model has room, and takes none from others.
        members.register(more, vec![ShardId::of(b"s")], |model| model == more).unwrap();
        assert!(members.lists.contains_key(&more));
        members.unregister(more);
        assert!(!members.lists.contains_key(&more) && members.places.is_empty());
    }

    #[test]
    fn bitmaps_are_as_short_as_they_can_be() {
        assert_eq!(bitmap(20, |bit| bit == 9), [0, 2]);
        assert_eq!(bitmap(20, |_| false), [] as [u8; 0]);
        let map = bitmap(20, |bit| bit % 3 == 0);
        assert!((0..20).all(|bit| has_bit(&map, bit) == (bit % 3 == 0)) && !has_bit(&map, 1000));
    }
}
