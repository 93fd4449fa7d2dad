//! Topics of models: in a crowd, what is held of a model is told to those that are interested in it.
//!
//! Up to [`CROWD`] members one topic is enough. Beyond, a node hears of most members once in many
//! minutes. So it joins a topic for each model that it publishes, keeps, holds, reads or helps to
//! keep, and says there every few seconds what it holds of that model. What it says on the swarm's
//! topic introduces it: of those that share a model with it, the few that are best placed by a hash
//! dial it, and with that it is in the model's topic. Manifests, heartbeats, doubts and goodbyes stay
//! on the swarm's topic.
//!
//! Invariants: a small swarm has no such topic; a node is in at most [`TOPICS_MAX`]; all topics of a
//! node together bring it about as many words a second as [`TOPIC_SHARE`] allows, however many
//! members they have.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{ModelId, PeerId, ShardId};

use super::crowd::Crowd;
use super::gossip::{Author, Due, holdings_messages};
use super::limits::{CROWD, TOPIC_CHANGES, TOPIC_PEERS, TOPIC_STAY, TOPICS_MAX, Timing, USHERS};
use super::peers::PeerHasher;
use super::planted::{self, Plant};
use super::{Action, Contact, Core};
use crate::wire::{Holdings, ModelHoldings};

/// What the name of every model's topic begins with.
pub const TOPIC_PREFIX: &str = "/doppler/model/";

/// The topic of a model in the swarm with this topic. It reveals neither to other swarms.
pub fn model_topic(swarm: &str, model: ModelId) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("doppler-node 2026 model topic v1");
    hasher.update(swarm.as_bytes());
    hasher.update(model.as_bytes());
    format!("{TOPIC_PREFIX}{}/1", hasher.finalize().to_hex())
}

/// One model's topic.
struct Topic {
    name: Arc<str>,
    /// Who speaks there.
    crowd: Crowd,
    /// Connected peers that take part.
    listeners: usize,
    since: Instant,
    /// When this node last said what it holds, and does next.
    said_at: Option<Instant>,
    due: Instant,
}

/// The topics that this node is in.
#[derive(Default)]
pub(super) struct Topics {
    joined: BTreeMap<ModelId, Topic>,
    by_name: BTreeMap<Arc<str>, ModelId>,
    /// The models that were named when this node last told the swarm what it holds.
    told: BTreeSet<ModelId>,
    /// When it is looked at which models this node is interested in; never in a small swarm.
    look_at: Option<Instant>,
}

impl Topics {
    pub(super) fn len(&self) -> usize {
        self.joined.len()
    }

    /// The model whose topic has this name, if this node is in it.
    pub(super) fn model(&self, name: &str) -> Option<ModelId> {
        self.by_name.get(name).copied()
    }

    pub(super) fn has(&self, model: ModelId) -> bool {
        self.joined.contains_key(&model)
    }

    pub(super) fn models(&self) -> impl Iterator<Item = ModelId> {
        self.joined.keys().copied()
    }

    /// A member has spoken on a model's topic, and promised to do so again within `next`.
    pub(super) fn hear(&mut self, now: Instant, model: ModelId, peer: PeerId, next: Duration) {
        if let Some(topic) = self.joined.get_mut(&model) {
            topic.crowd.hear(now, peer, next, u64::MAX);
        }
    }

    /// Whether what a peer says that it holds concerns a topic of this node.
    pub(super) fn concerns(&self, holdings: &Holdings) -> bool {
        !self.joined.is_empty() && holdings.models.iter().any(|entry| self.has(entry.model))
    }

    /// The swarm was told what this node holds of these models.
    pub(super) fn named(&mut self, holdings: &[ModelHoldings]) {
        let is_same = self.told.len() == holdings.len()
            && holdings.iter().all(|entry| self.told.contains(&entry.model));
        if !is_same {
            self.told = holdings.iter().map(|entry| entry.model).collect();
        }
    }

    /// When something is to be done, if this is a crowd.
    pub(super) fn next(&self) -> Option<Instant> {
        self.joined.values().map(|topic| topic.due).chain(self.look_at).min()
    }

    /// The holdings of a model may have changed: they are told soon.
    fn change(&mut self, now: Instant, timing: &Timing, every: Duration, of: Option<ModelId>) {
        for (model, topic) in &mut self.joined {
            if of.is_some_and(|of| of != *model) {
                continue;
            }
            let rested = topic.said_at.map_or(now, |said| now.max(said + every / TOPIC_CHANGES));
            topic.due = topic.due.min(rested + timing.settle);
        }
    }

    /// Counts the connected peers that take part in each topic. Returns those that have more.
    fn count(&mut self, contacts: &BTreeMap<PeerId, Contact>) -> Vec<ModelId> {
        let mut more = Vec::new();
        for (model, topic) in &mut self.joined {
            let listens =
                |contact: &&Contact| contact.topics.iter().any(|name| **name == *topic.name);
            let listeners = contacts.values().filter(listens).count();
            if listeners > topic.listeners {
                more.push(*model);
            }
            topic.listeners = listeners;
        }
        more
    }
}

impl Core {
    /// Whether this node hears from all that share a model with it what they hold: it is in the model's
    /// topic, or the swarm is small.
    pub fn follows(&self, model: ModelId) -> bool {
        self.size() <= CROWD || self.topics.has(model)
    }

    /// The topics of models that this node is in.
    pub fn topics(&self) -> usize {
        self.topics.len()
    }

    /// The members that share a model with this node, itself included: those that it knows, or as many as
    /// their promises stand for.
    fn sharers(&self, model: ModelId) -> usize {
        let known = self.membership.sharers(model).count() + 1;
        let told = self.topics.joined.get(&model).map_or(0, |topic| topic.crowd.steady_size());
        known.max(told)
    }

    /// How often this node says on a topic what it holds: on all its topics together it then hears a few
    /// words a second.
    fn topic_round(&self) -> Duration {
        let sharers: usize = self.topics.joined.keys().map(|model| self.sharers(*model)).sum();
        self.config.timing.topic_round(sharers)
    }

    /// Call when this node's interests may have changed, or what it holds.
    pub(super) fn stir_topics(&mut self, now: Instant) {
        if let Some(at) = self.topics.look_at {
            self.topics.look_at = Some(at.min(now + self.config.timing.settle));
            let round = self.topic_round();
            self.topics.change(now, &self.config.timing, round, None);
        }
    }

    /// Call when a read begins: in a crowd, who holds the object may not be known.
    pub(super) fn topics_read(&mut self, now: Instant, shard: ShardId) {
        let is_followed = |model: &ModelId| self.topics.has(*model);
        let places = self.membership.places(shard);
        if self.topics.look_at.is_some()
            && !is_followed(&ModelId::from(*shard.as_bytes()))
            && !places.iter().any(|(model, _)| is_followed(model))
        {
            self.topics.look_at = Some(now);
        }
    }

    /// Call when the connected peers have changed.
    pub(super) fn topics_met(&mut self, now: Instant) {
        if self.topics.joined.is_empty() {
            return;
        }
        let more = self.topics.count(&self.contacts);
        if !more.is_empty() {
            let round = self.topic_round();
            for model in more {
                self.topics.change(now, &self.config.timing, round, Some(model));
            }
        }
    }

    /// Joins and leaves topics, says what is due on them, and dials for those that have too few peers.
    pub(super) fn on_topics(&mut self, now: Instant, out: &mut Vec<Action>) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.topics.look_at) {
            self.topics.look_at = Some(now + self.config.timing.upkeep(self.size()));
            self.review_topics(now, out);
        }
        if is_due(self.topics.next()) {
            self.say_on_topics(now, out);
        }
    }

    /// Call at every upkeep: a swarm has become a crowd, or is none any more.
    pub(super) fn mind_topics(&mut self, now: Instant, out: &mut Vec<Action>) {
        // A crowd that shrinks keeps its topics for a while, so that they do not come and go.
        let is_small = self.size() <= if self.topics.look_at.is_some() { CROWD / 2 } else { CROWD };
        if is_small && self.topics.look_at.is_some() {
            self.topics.look_at = None;
            self.join_only(now, &BTreeSet::new(), out);
        } else if !is_small && self.topics.look_at.is_none() && !planted::is(Plant::ModelTopics) {
            self.topics.look_at = Some(now);
        }
    }

    fn review_topics(&mut self, now: Instant, out: &mut Vec<Action>) {
        let wanted = self.interests();
        self.join_only(now, &wanted, out);
        // Others learn of a new interest by this node's next word, which does not wait for its round.
        if self.topics.joined.keys().any(|model| !self.topics.told.contains(model)) {
            self.schedule.change(now, Due::Introduction);
        }
        let few = self.topics.joined.iter().filter(|(_, topic)| topic.listeners < TOPIC_PEERS);
        let few: Vec<(ModelId, usize)> =
            few.map(|(model, topic)| (*model, TOPIC_PEERS - topic.listeners)).collect();
        for (model, count) in few {
            self.dial_sharers(now, model, count, out);
        }
    }

    /// The models that this node is interested in, those first that it must not lose: its own and kept
    /// ones, what it holds or reads, what it helps to keep. Of the last, each node has others.
    fn interests(&self) -> BTreeSet<ModelId> {
        let mut reads = BTreeSet::new();
        for shard in self.reads.values().map(|reading| reading.request.shard) {
            reads.extend(self.membership.places(shard).iter().map(|(model, _)| *model));
            // Of a model that is not registered, only the manifest can be read.
            reads.extend(
                self.announcements.manifest_size(shard).map(|_| ModelId::from(*shard.as_bytes())),
            );
        }
        let rank = |(model, list): (&ModelId, &[ShardId])| {
            let rank = if self.announcements.is_protected(*model) {
                0
            } else if self.holds_of(*model, list) || reads.contains(model) {
                1
            } else if self.helped.contains(model) {
                2
            } else {
                return None;
            };
            let mut hasher = PeerHasher::default();
            hasher.write(self.config.own.as_bytes());
            hasher.write(model.as_bytes());
            Some((rank, hasher.finish(), *model))
        };
        let mut ranked: Vec<(u8, u64, ModelId)> =
            self.membership.lists().filter_map(rank).collect();
        ranked.sort_unstable();
        let new = reads.iter().filter(|model| self.membership.list(**model).is_none());
        ranked.splice(0..0, new.map(|model| (0, 0, *model)));
        ranked.into_iter().take(TOPICS_MAX).map(|(_, _, model)| model).collect()
    }

    fn join_only(&mut self, now: Instant, wanted: &BTreeSet<ModelId>, out: &mut Vec<Action>) {
        let left = self.topics.joined.iter().filter(|(model, topic)| {
            // A read makes a model interesting for a while.
            let is_new = now < topic.since + TOPIC_STAY && !wanted.is_empty();
            !wanted.contains(model) && !is_new
        });
        for model in left.map(|(model, _)| *model).collect::<Vec<_>>() {
            // Nobody is to wait for its next word there.
            self.say_on_topic(now, model, Duration::ZERO, out);
            if let Some(topic) = self.topics.joined.remove(&model) {
                self.topics.by_name.remove(&topic.name);
                out.push(Action::Leave(topic.name));
            }
        }
        let Self { topics, config, contacts, .. } = self;
        for model in wanted {
            if topics.joined.contains_key(model) || topics.joined.len() >= TOPICS_MAX {
                continue;
            }
            let name: Arc<str> = model_topic(&config.topic, *model).into();
            topics.by_name.insert(Arc::clone(&name), *model);
            out.push(Action::Join { model: *model, topic: Arc::clone(&name) });
            let topic = Topic {
                name,
                crowd: Crowd::new(now),
                listeners: 0,
                since: now,
                said_at: None,
                due: now + config.timing.announce_every,
            };
            topics.joined.insert(*model, topic);
        }
        for model in topics.count(contacts) {
            topics.change(now, &config.timing, config.timing.announce_every, Some(model));
        }
        self.membership.care_for(self.topics.joined.keys().copied().collect());
    }

    fn say_on_topics(&mut self, now: Instant, out: &mut Vec<Action>) {
        let round = self.topic_round();
        let due = self.topics.joined.iter().filter(|(_, topic)| topic.due <= now);
        for model in due.map(|(model, _)| *model).collect::<Vec<_>>() {
            self.say_on_topic(now, model, round, out);
        }
    }

    /// Says on a model's topic what this node holds of it, and that it speaks there again within `next`; zero
    /// if it does not.
    fn say_on_topic(
        &mut self,
        now: Instant,
        model: ModelId,
        next: Duration,
        out: &mut Vec<Action>,
    ) {
        if self.has_stopped {
            return;
        }
        let holdings = self.own_holdings(now, |other| other == model);
        let Some(topic) = self.topics.joined.get_mut(&model) else { return };
        (topic.said_at, topic.due) = (Some(now), now + next);
        let author = Author {
            peer: self.config.own,
            run: self.config.run,
            lease: self.config.timing.topic_lease(next),
            next,
            offer: self.offer,
            addresses: &self.addresses,
        };
        let name = &topic.name;
        let messages = holdings_messages(author, holdings, &mut self.numbers);
        out.extend(messages.into_iter().map(|data| Action::Tell { topic: Arc::clone(name), data }));
    }

    /// Dials so many of those that share a model with this node and are not connected.
    fn dial_sharers(&mut self, now: Instant, model: ModelId, count: usize, out: &mut Vec<Action>) {
        let own = self.config.own;
        let away = self.membership.sharers(model);
        let away = away.filter(|peer| !self.contacts.contains_key(peer));
        let mut away: Vec<(u64, PeerId)> = away.map(|peer| (closeness(own, peer), peer)).collect();
        away.sort_unstable_by(|one, other| other.cmp(one));
        self.dial(now, away.into_iter().take(count).map(|(_, peer)| peer).collect(), out);
    }

    /// A peer has said on the swarm's topic what it holds. If it shares a topic with this node and was not
    /// heard there, those of the topic that are best placed dial it.
    pub(super) fn usher(
        &mut self,
        now: Instant,
        author: PeerId,
        holdings: &Holdings,
        out: &mut Vec<Action>,
    ) {
        if self.contacts.contains_key(&author) || self.membership.is_near(now, author) {
            return;
        }
        let mut shared = holdings.models.iter().map(|entry| entry.model);
        let shared = shared.find(|model| self.topics.has(*model) && self.is_usher(author, *model));
        if shared.is_some() {
            self.known.call(now, author);
            self.dial(now, vec![author], out);
        }
    }

    /// Whether this node is among the few of a topic that dial a peer for all. If it does not know all of
    /// the topic, nor do the others, and each counts for as many.
    fn is_usher(&self, peer: PeerId, model: ModelId) -> bool {
        let own = closeness(self.config.own, peer);
        let (mut known, mut better) = (1, 0);
        for other in self.membership.sharers(model).filter(|other| *other != peer) {
            known += 1;
            better += usize::from(closeness(other, peer) > own);
        }
        better * self.sharers(model).max(known) < USHERS * known
    }
}

/// A peer's place among those that dial another for all; higher is better.
fn closeness(peer: PeerId, other: PeerId) -> u64 {
    let mut hasher = PeerHasher::default();
    hasher.write(peer.as_bytes());
    hasher.write(other.as_bytes());
    hasher.finish()
}

#[cfg(test)]
#[path = "topics_tests.rs"]
mod tests;
