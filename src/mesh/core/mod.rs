//! What the mesh decides. Pure: an event and a time go in, actions come out.
//!
//! Owns who is connected, who holds what, who may be believed, what is announced and when, and
//! which bytes of which read are requested from which peer. Performs nothing itself: it has no
//! clock, runtime, socket or lock. The node performs the actions (`shared`, `actor`, `fetch`); a
//! simulator may perform them in virtual time.
//!
//! Invariants: the same events at the same times give the same actions (every map is ordered);
//! each read that began ends with exactly one [`Action::End`], unless its caller dropped it;
//! every collection that a peer can grow has a bound in `limits`.

mod absence;
mod announcements;
mod answer;
mod bucket;
mod catalogue;
mod census;
mod crowd;
mod dialling;
mod gossip;
mod healing;
mod hearing;
mod heat;
mod known;
mod lens;
pub mod limits;
mod links;
mod liveness;
#[cfg(test)]
mod meeting_tests;
mod membership;
mod meter;
mod peers;
pub mod planted;
mod pull;
mod reads;
mod reputation;
mod scheduler;
#[cfg(test)]
mod tests;
mod topics;
mod twins;
mod word;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{Address, ModelId, PeerId, ShardId, Transport};
use doppler_store::groups::Chunks;
use doppler_store::signature::{PublicKey, SignatureError, SignedModel};
use doppler_store::{ReadError, ReadRequest};
use serde::{Deserialize, Serialize};

use crate::wire::{Envelope, HOT_MAX, ModelHoldings, PartHoldings};
use absence::Absence;
use announcements::{Announcements, Origin};
pub use answer::{Answer, Failure, FailureKind, Proved};
pub use bucket::Bucket;
pub use census::Fill;
use crowd::Crowd;
pub use doppler_store::Replicas;
pub use gossip::Offer;
use gossip::{Author, Due, Inbox, Numbers, Schedule, holdings_messages};
pub use healing::{HealAction, HealOptions, HealView, Healing, Kept};
use heat::Heat;
use known::Known;
pub use known::{Away, Source};
pub use lens::Lens;
use limits::{
    ANNOUNCEMENTS_PER_TURN, OWN_PARTS_MAX, PEERS_REMEMBERED_MAX, RELAYED_MANIFEST_BYTES_MAX, Timing,
};
use membership::{Membership, bitmap};
pub use meter::{Meter, Progress};
pub use pull::{Pull, PullAction, PullEvent, Wanted};
pub use reads::RELAYED;
use reads::Reading;
use reputation::{Conduct, Reputation};
pub use scheduler::Ask;
use scheduler::Scheduler;
use topics::Topics;
pub use topics::{TOPIC_PREFIX, model_topic};
pub use twins::Twin;
use twins::Twins;
pub use word::Word;

/// Identifies a read. Chosen by the caller that begins it, never used twice.
pub type ReadId = u64;
/// Identifies a request to a peer. Never used twice.
pub type RequestId = u64;
/// Identifies a gossip message until it is judged.
pub type MessageId = u64;

/// A bound was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}: at most {max}")]
pub struct TooMany {
    pub what: &'static str,
    pub max: usize,
}

/// Why a publication or a registration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    TooMany(#[from] TooMany),
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

/// What decisions need to know about a connected peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contact {
    /// Whether it is connected without a relay.
    pub is_direct: bool,
    /// Whether it takes part in the swarm's topic.
    pub listens: bool,
    /// Addresses at which it can be dialled again, best first; empty until they are known.
    pub reached: Vec<Address>,
    /// The topics of models that it takes part in.
    pub topics: Vec<Arc<str>>,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The connected peers, all of them.
    Contacts(BTreeMap<PeerId, Contact>),
    /// A gossip message whose author's signature was checked.
    Gossip { message: MessageId, topic: Arc<str>, author: PeerId, word: Word },
    /// A private swarm's gate refused a peer, or a peer's gate refused this node.
    KeptOut { peer: PeerId, is_guilty: bool },
    /// The last run or the local network says that a peer is at these addresses.
    Known { peer: PeerId, source: Source, addresses: Vec<Address> },
    /// A dial of a peer failed. `is_stranger`: the peer cannot take part in this swarm at all.
    NotReached { peer: PeerId, reason: String, is_stranger: bool },
    /// Two nodes use one identity, this node's or a peer's, at these places as far as they are
    /// known.
    Twin { peer: PeerId, places: Vec<Address> },
    /// A connected peer says that two nodes use this node's identity.
    ToldOfTwin { by: PeerId },
    /// Where this node listens.
    Addresses(Vec<Address>),
    /// Everything that this node holds in full.
    Whole(BTreeSet<ShardId>),
    /// What this node holds partially, as far as it is announced.
    Parts(BTreeMap<ShardId, Chunks>),
    /// What this node offers the swarm, or that it is about to leave.
    Offer(Offer),
    /// The models, all of them, of which this node copies objects that too few hold.
    Help(BTreeSet<ModelId>),
    /// This node stops: it takes leave and says nothing more.
    Stop,
    /// Everything that is pinned here.
    Pinned(BTreeSet<ShardId>),
    /// This node announces a model from now on.
    Publish(SignedModel),
    /// This node keeps a model, with this announcement: the model is not forgotten, and is
    /// announced while any of its objects is here.
    Keep(SignedModel),
    /// This node stops keeping a model. If `own` is given, it also stops announcing it as its own.
    Release { model: ModelId, own: bool },
    /// The publishers, all of them, whose models have priority when room is short.
    Trust(BTreeSet<PublicKey>),
    /// The ordered object list of a model is known: bitmaps of holdings refer to it.
    Register { model: ModelId, objects: Vec<ShardId> },
    /// A read begins.
    Read { read: ReadId, request: ReadRequest },
    /// The caller of a read has gone.
    Dropped { read: ReadId },
    /// Bytes of an answer came from a peer.
    Heard { peer: PeerId },
    /// A request ended, for whatever reason.
    Answered { read: ReadId, request: RequestId, peer: PeerId, answer: Answer },
    /// Bytes of objects were sent to a peer.
    Sent { peer: PeerId, bytes: u64 },
    /// [`Core::next_wake`] has come.
    Time,
}

/// What the node must do.
#[derive(Debug)]
pub enum Action {
    /// Say this on the swarm's topic.
    Publish(Vec<u8>),
    /// Take part in a model's topic, or stop to.
    Join {
        model: ModelId,
        topic: Arc<str>,
    },
    Leave(Arc<str>),
    /// Say this on a model's topic.
    Tell {
        topic: Arc<str>,
        data: Vec<u8>,
    },
    /// Pass a message on, or hold its forwarder to account.
    Judge {
        message: MessageId,
        is_sound: bool,
    },
    /// Connect to a peer.
    Dial {
        peer: PeerId,
        addresses: Vec<Address>,
    },
    /// Disconnect a peer and refuse it until then.
    Ban {
        peer: PeerId,
        until: Instant,
        shard: ShardId,
        detail: String,
    },
    /// Tell this node's owner that two nodes use one identity, this node's or a peer's.
    Warn(Twin),
    /// Tell the nodes that are connected under this identity that there are two of them.
    TellTwins(PeerId),
    /// Drop the streams kept open to a peer, which are dead.
    ForgetStreams(PeerId),
    /// Ask a peer for a range; over a relay only if that is allowed.
    Ask {
        ask: Ask,
        may_relay: bool,
    },
    /// Keep what a request proved, up to this byte of the object.
    Keep {
        read: ReadId,
        request: RequestId,
        end: u64,
    },
    /// End a request, but keep what it has proved.
    Stop {
        read: ReadId,
        request: RequestId,
    },
    /// End a request and drop what it has proved.
    Abandon {
        read: ReadId,
        request: RequestId,
    },
    /// Drop what was kept of a request: its peer lied about the object's size.
    Discard {
        read: ReadId,
        request: RequestId,
    },
    /// The read is over: either what was kept is its whole range, or this is the error.
    End {
        read: ReadId,
        result: Result<(), ReadError>,
    },
    /// A model that was not known before, from this node or from a peer.
    Learned {
        signed: SignedModel,
        is_own: bool,
    },
    /// Nobody holds or announces a model any more.
    Forgot(ModelId),
    /// The publication or registration is refused.
    Refuse(Refused),
    /// Peers, holdings or counts may have changed, so watchers are notified.
    Changed,
}

/// What a decision may look at besides events.
pub trait Sight {
    /// The byte of the object up to which a request's answer is proved; 0 before its first group.
    fn proved(&self, read: ReadId, request: RequestId) -> u64;

    /// Whether this node's own download limit sets the pace, so that no peer counts as late.
    fn is_throttled(&self, now: Instant) -> bool;
}

/// What a core is started with.
#[derive(Debug, Clone)]
pub struct Config {
    pub own: PeerId,
    /// A random number for this run, not 0.
    pub run: u64,
    /// Larger than in all earlier runs of this identity.
    pub epoch: u64,
    /// The swarm's gossip topic; others are ignored.
    pub topic: String,
    pub timing: Timing,
    /// How long a read looks for a holder before it is `NotFound`.
    pub find_timeout: Duration,
}

/// Bytes of objects exchanged with one peer. Kept after it has gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Verified bytes received.
    pub bytes_in: u64,
    /// Bytes of objects sent.
    pub bytes_out: u64,
    /// Bytes received and discarded because they did not match their hash.
    pub rejected: u64,
}

/// What is in progress now. All zero once every peer has gone and its lease has expired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Streams of the shard protocol opened by peers.
    pub streams: usize,
    /// Peers whose announced holdings are believed.
    pub leases: usize,
    /// Reads from peers.
    pub reads: usize,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Bytes received and proved.
    pub verified_bytes: u64,
    /// Bytes received and discarded because they did not match their hash.
    pub rejected_bytes: u64,
    /// Bytes of objects sent to peers.
    pub served_bytes: u64,
    /// Announcements dropped because their signature is invalid.
    pub bad_signatures: u64,
    /// Gossip messages dropped because they were malformed or spoke for another peer.
    pub bad_messages: u64,
    /// Gossip messages dropped because their author sends too many, or nothing had room.
    pub ignored_messages: u64,
    /// Times a peer was banned.
    pub bans: u64,
    /// Requests that were asked of a second peer because the first was late or silent.
    pub hedges: u64,
    /// Streams refused because there were too many, from one peer or from all.
    pub refused_streams: u64,
    /// Connections that failed at a private swarm's gate, this node's or the peer's.
    pub refused_peers: u64,
}

/// Who could serve an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holders {
    /// Connected and trusted.
    pub ready: Vec<(PeerId, Chunks)>,
    /// Known by a lease, but not connected.
    pub away: Vec<(PeerId, Chunks)>,
    /// Connected, but through a relay that may not carry this.
    pub relayed: Vec<(PeerId, Chunks)>,
}

/// What is known about a peer's behaviour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    pub traffic: Traffic,
    /// 0 (worst) to 1.
    pub score: f64,
    /// Measured bytes per second, if any transfer was long enough.
    pub rate: Option<f64>,
    /// Objects that it says it holds whole.
    pub held: u64,
}

/// Everything that the mesh knows. Makes every decision.
pub struct Core {
    config: Config,
    membership: Membership,
    announcements: Announcements,
    reputation: Reputation,
    scheduler: Scheduler,
    schedule: Schedule,
    inbox: Inbox,
    crowd: Crowd,
    topics: Topics,
    numbers: Numbers,
    absence: Absence,
    /// When this node last answered a doubt of itself, or will answer one.
    refuted: Option<Instant>,
    /// Since when this node has been awake: peers' words before it may have passed it by.
    awake: Instant,
    /// It has taken leave.
    has_stopped: bool,
    offer: Offer,
    /// The models of which it copies objects that too few hold.
    helped: BTreeSet<ModelId>,
    heat: Heat,
    pinned: BTreeSet<ShardId>,
    known: Known,
    twins: Twins,
    contacts: BTreeMap<PeerId, Contact>,
    /// How many of them take part in the swarm's topic.
    listeners: usize,
    addresses: Vec<Address>,
    whole: BTreeSet<ShardId>,
    parts: BTreeMap<ShardId, Chunks>,
    reads: BTreeMap<ReadId, Reading>,
    counts: Counts,
    traffic: BTreeMap<PeerId, Traffic>,
    /// When leases are looked at next, and when models that nobody announces.
    upkeep: Instant,
    forget_at: Instant,
    /// When peers are dialled next, and when they were last dialled.
    dial_at: Instant,
    dialled_at: Option<Instant>,
    /// When a read must be examined next, if nothing happens before.
    reads_wake: Option<Instant>,
}

impl Core {
    pub fn new(config: Config, now: Instant) -> Self {
        let mut schedule = Schedule::new(config.timing, now);
        schedule.change(now, Due::Everything);
        Self {
            membership: Membership::default(),
            announcements: Announcements::default(),
            reputation: Reputation::default(),
            scheduler: Scheduler::default(),
            schedule,
            inbox: Inbox::new(now),
            crowd: Crowd::new(now),
            topics: Topics::default(),
            numbers: Numbers::new(config.epoch),
            absence: Absence::default(),
            refuted: None,
            awake: now,
            has_stopped: false,
            offer: Offer::default(),
            helped: BTreeSet::new(),
            heat: Heat::default(),
            pinned: BTreeSet::new(),
            known: Known::new(config.own),
            twins: Twins::default(),
            contacts: BTreeMap::new(),
            listeners: 0,
            addresses: Vec::new(),
            whole: BTreeSet::new(),
            parts: BTreeMap::new(),
            reads: BTreeMap::new(),
            counts: Counts::default(),
            traffic: BTreeMap::new(),
            upkeep: now + config.timing.upkeep(1),
            forget_at: now,
            dial_at: now,
            dialled_at: None,
            reads_wake: None,
            config,
        }
    }

    /// Handles an event. Returns the actions to perform, in this order.
    pub fn on(&mut self, now: Instant, event: Event, sight: &dyn Sight) -> Vec<Action> {
        let mut out = Vec::new();
        self.on_into(now, event, sight, &mut out);
        out
    }

    /// The same, but puts the actions behind those that are in `out`.
    pub fn on_into(
        &mut self,
        now: Instant,
        event: Event,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        match event {
            Event::Contacts(contacts) => self.on_contacts(now, contacts, sight, out),
            Event::Gossip { message, topic, author, word } => {
                self.on_gossip(now, (message, &topic, author), &word, sight, out);
            }
            Event::KeptOut { peer, is_guilty } => {
                self.counts.refused_peers += 1;
                if is_guilty {
                    self.note(now, peer, Conduct::Violation);
                }
                out.push(Action::Changed);
            }
            Event::Known { peer, source, addresses } => {
                self.known.learn(now, peer, source, addresses);
                self.dial_soon(now);
            }
            Event::NotReached { peer, reason, is_stranger } => {
                self.known.failed(peer, reason, is_stranger);
                out.push(Action::Changed);
            }
            Event::Twin { peer, places } => {
                let places = places.iter().map(|place| place.without_peer().to_string());
                self.on_twin(now, Twin { peer, places: places.collect(), told_by: None }, out);
            }
            Event::ToldOfTwin { by } => {
                let twin = Twin { peer: self.config.own, places: vec![], told_by: Some(by) };
                self.on_twin(now, twin, out);
            }
            Event::Addresses(addresses) => self.on_addresses(now, addresses),
            Event::Whole(whole) => {
                self.whole = whole;
                self.schedule.change(now, Due::Holdings);
                self.stir_topics(now);
            }
            Event::Parts(parts) => {
                if parts != self.parts {
                    self.parts = parts;
                    self.schedule.change(now, Due::Holdings);
                    self.stir_topics(now);
                }
            }
            Event::Offer(offer) => {
                // Room alone changes with every copy, so the next round announces it.
                if offer.is_leaving != self.offer.is_leaving {
                    self.schedule.change(now, Due::Holdings);
                    self.stir_topics(now);
                }
                self.offer = offer;
            }
            Event::Help(models) => self.on_help(now, models),
            Event::Pinned(pinned) => self.on_pinned(now, pinned),
            Event::Publish(signed) => self.on_publish(now, signed, Origin::Own, out),
            Event::Keep(signed) => self.on_publish(now, signed, Origin::Kept, out),
            Event::Release { model, own } => self.on_release(now, model, own, out),
            Event::Trust(trusted) => self.announcements.trust(trusted),
            Event::Register { model, objects } => {
                self.on_register(now, (model, objects), sight, out);
            }
            Event::Read { read, request } => self.on_read(now, read, request, sight, out),
            Event::Dropped { read } => self.on_dropped(now, read, sight, out),
            Event::Heard { peer } => self.scheduler.links.heard(now, peer),
            Event::Answered { read, request, peer, answer } => {
                self.on_answered(now, (read, request, peer), answer, sight, out);
            }
            Event::Sent { peer, bytes } => {
                self.counts.served_bytes += bytes;
                self.traffic_of(peer).bytes_out += bytes;
            }
            Event::Stop => self.on_stop(out),
            Event::Time => self.on_time(now, sight, out),
        }
    }

    /// When [`Event::Time`] is due, if nothing happens before.
    pub fn next_wake(&self) -> Instant {
        let wake = self.schedule.next().min(self.upkeep).min(self.dial_at);
        let wake = self.topics.next().map_or(wake, |topics| topics.min(wake));
        self.reads_wake.map_or(wake, |reads| reads.min(wake))
    }

    /// Who could serve an object now.
    pub fn holders(&self, now: Instant, shard: ShardId) -> Holders {
        let mut holders = Holders::default();
        for (peer, chunks) in self.membership.holders(now, shard) {
            if self.reputation.is_shunned(now, peer) {
                continue;
            }
            match self.contacts.get(&peer) {
                Some(contact) if contact.is_direct || self.may_relay(shard) => {
                    holders.ready.push((peer, chunks));
                }
                Some(_) => holders.relayed.push((peer, chunks)),
                None => holders.away.push((peer, chunks)),
            }
        }
        holders
    }

    /// Whether an object may go over a relay. Only small manifests may.
    pub fn may_relay(&self, shard: ShardId) -> bool {
        may_relay(&self.announcements, shard)
    }

    /// The announced models, with the number of peers that hold some of each.
    pub fn models(&self, now: Instant) -> Vec<(SignedModel, usize)> {
        let count = |signed: SignedModel| {
            let holders = self.membership.holders_of_model(now, signed.model).count();
            (signed, holders)
        };
        self.announcements.all().into_iter().map(count).collect()
    }

    /// The announced models.
    pub fn announced(&self) -> Vec<SignedModel> {
        self.announcements.all()
    }

    pub fn standing(&self, now: Instant, peer: PeerId) -> Standing {
        Standing {
            traffic: self.traffic.get(&peer).copied().unwrap_or_default(),
            score: self.reputation.score(peer),
            rate: self.scheduler.links.rate(peer),
            held: self.membership.held_by(now, peer),
        }
    }

    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// By peer, including those that have gone.
    pub const fn traffic(&self) -> &BTreeMap<PeerId, Traffic> {
        &self.traffic
    }

    /// Peers whose holdings are believed, and reads in flight.
    pub fn load(&self) -> Load {
        Load { streams: 0, leases: self.membership.peers().count(), reads: self.reads.len() }
    }

    /// The known peers that are not connected, the most useful first.
    pub fn away(&self, now: Instant) -> Vec<Away> {
        self.known.report(now)
    }

    /// The peer that reads wait for most: it has owed answers for a while and delivers the least.
    pub fn slowest(&self, now: Instant) -> Option<PeerId> {
        self.scheduler.links.slowest(now)
    }

    /// Identities that two nodes were recently seen to use, including this node's own.
    pub fn twins(&self, now: Instant) -> Vec<Twin> {
        self.twins.now(now)
    }

    /// The number of peers banned now.
    pub fn banned(&self, now: Instant) -> usize {
        self.reputation.banned(now)
    }

    fn on_contacts(
        &mut self,
        now: Instant,
        contacts: BTreeMap<PeerId, Contact>,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let listened = |peer: &PeerId| self.contacts.get(peer).is_some_and(|old| old.listens);
        // Where more are than one connects to, a newcomer waits for the others' rounds: what each of
        // them says to it, all others hear once more.
        let was_alone = self.listeners == 0;
        if (was_alone || self.size() <= limits::DIAL_TARGET)
            && contacts.iter().any(|(peer, contact)| contact.listens && !listened(peer))
        {
            self.schedule.meet(now, self.listeners);
        }
        // Who went away, or to whom another way leads now, which is to be measured afresh.
        for (peer, old) in &self.contacts {
            let new = contacts.get(peer);
            if new.is_some_and(|new| new.is_direct != old.is_direct) {
                self.scheduler.links.renew(*peer);
            }
            if new.is_none_or(|new| new.is_direct != old.is_direct) {
                out.push(Action::ForgetStreams(*peer));
            }
        }
        let connected = |contacts: &BTreeMap<PeerId, Contact>| contacts.keys().copied().collect();
        self.absence.update(now, &connected(&self.contacts), &connected(&contacts));
        if self.contacts.keys().any(|peer| !contacts.contains_key(peer)) {
            // Whoever was lost is doubted in time.
            self.upkeep = self.upkeep.min(now + limits::DOUBT_AFTER);
        }
        self.known.contacts(now, &contacts);
        self.dial_soon(now);
        self.listeners = contacts.values().filter(|contact| contact.listens).count();
        self.contacts = contacts;
        self.topics_met(now);
        self.settle(now, true, sight, out);
        out.push(Action::Changed);
    }

    fn on_time(&mut self, now: Instant, sight: &dyn Sight, out: &mut Vec<Action>) {
        // A newcomer has heard from others at which pace they speak.
        if self.schedule.next() <= now {
            self.schedule.set_pace(now, self.size());
        }
        if let Some(due) = self.schedule.due(now) {
            let (said, more) = self.say(now, due, out);
            self.schedule.said(now, said);
            if due > Due::Heartbeat {
                self.schedule.said_holdings(now, self.listeners);
            }
            if more {
                self.schedule.change(now, Due::Holdings);
            }
        }
        let mut stirred = false;
        if self.upkeep <= now {
            self.look_for_the_silent(now, out);
            self.upkeep = now + self.config.timing.upkeep(self.size());
            stirred = self.membership.expire(now);
            let Self { absence, membership, .. } = self;
            absence.retain(|peer| membership.knows(peer));
            self.twins.expire(now);
            self.schedule.set_pace(now, self.size());
            self.mind_topics(now, out);
            if self.forget_at <= now {
                self.forget_at = now + self.lease() / 16;
                self.forget(now, self.lease(), None, out);
            }
            self.dial_soon(now);
        }
        self.on_topics(now, out);
        if self.dial_at <= now {
            self.dial_known(now, out);
        }
        self.settle(now, stirred, sight, out);
        if stirred {
            out.push(Action::Changed);
        }
    }

    /// Sends what is due. Returns the number of messages, and whether more is due.
    fn say(&mut self, now: Instant, due: Due, out: &mut Vec<Action>) -> (usize, bool) {
        if self.has_stopped {
            return (0, false);
        }
        let next = self.schedule.beat();
        if due == Due::Heartbeat {
            let stamp = self.numbers.next();
            out.push(Action::Publish(Envelope::Heartbeat { stamp, next }.encode()));
            return (1, false);
        }
        if due >= Due::Meeting && self.size() <= limits::CROWD {
            self.announcements.owe_all();
        }
        let models = u32::try_from(self.announcements.len()).unwrap_or(u32::MAX);
        let quiet = self.config.timing.announce_every / 2;
        let quiet = quiet.max(limits::MODEL_SHARE.saturating_mul(models));
        let held: BTreeSet<ModelId> = self
            .membership
            .lists()
            .filter(|(model, list)| {
                self.whole.contains(&model.manifest()) && self.holds_of(**model, list)
            })
            .map(|(model, _)| *model)
            .collect();
        // Only models of which others can fetch something here are announced: not those of which
        // only the manifest is here.
        let holds = |model: ModelId| held.contains(&model);
        let Self { announcements, .. } = self;
        let (models, more) = announcements.take_due(now, quiet, ANNOUNCEMENTS_PER_TURN, holds);
        let announcements =
            models.into_iter().map(|signed| Envelope::Announcement(signed).encode());
        let mut messages: Vec<Vec<u8>> = announcements.collect();
        let holdings = self.own_holdings(now, |_| true);
        if self.listeners > 0 {
            self.topics.named(&holdings);
        }
        let author = Author {
            peer: self.config.own,
            run: self.config.run,
            lease: self.lease(),
            next,
            offer: self.offer,
            addresses: &self.addresses,
        };
        messages.extend(holdings_messages(author, holdings, &mut self.numbers));
        let said = messages.len();
        out.extend(messages.into_iter().map(Action::Publish));
        (said, more)
    }

    /// What this node holds of some models, for gossip.
    fn own_holdings(&self, now: Instant, of: impl Fn(ModelId) -> bool) -> Vec<ModelHoldings> {
        let (held, parts) = (&self.whole, &self.parts);
        let hottest = self.heat.hottest(now);
        let mut room = OWN_PARTS_MAX;
        let entry = |(model, list): (&ModelId, &[ShardId])| {
            let is_protected = self.announcements.is_protected(*model);
            let is_told = |id: &ShardId| is_protected || !self.is_anothers(*model, *id);
            let mut told = Vec::new();
            for (object, id) in list.iter().enumerate().filter(|_| !parts.is_empty()) {
                if let (Some(chunks), Ok(object)) = (parts.get(id), u32::try_from(object))
                    && !held.contains(id)
                    && room > 0
                    && is_told(id)
                {
                    told.push(PartHoldings { object, chunks: *chunks });
                    room -= 1;
                }
            }
            let manifest = model.manifest();
            let mut here = list.iter().chain([&manifest]).filter(|id| held.contains(id)).peekable();
            let pins = here.peek().is_some() && here.all(|id| self.pinned.contains(id));
            ModelHoldings {
                model: *model,
                manifest: held.contains(&model.manifest()),
                objects: bitmap(list.len(), |bit| {
                    list.get(bit).is_some_and(|id| held.contains(id) && is_told(id))
                }),
                parts: told,
                // Whoever does not hear what others hold could not count copies.
                helps: self.helped.contains(model) && self.follows(*model),
                hot: self.places_of(*model, &hottest),
                pins,
            }
        };
        let lists = self.membership.lists().filter(|(model, _)| of(**model));
        let mut said: Vec<ModelHoldings> = lists.map(entry).collect();
        // Of these, it looks for the manifest.
        let sought = self.topics.models().filter(|model| self.membership.list(*model).is_none());
        said.extend(sought.filter(|model| of(*model)).map(ModelHoldings::nothing));
        said
    }

    /// The places of some objects in a model's list, as many as a message may name.
    fn places_of(&self, model: ModelId, objects: &[ShardId]) -> Vec<u32> {
        let places = objects.iter().filter_map(|shard| self.membership.place(model, *shard));
        places.filter_map(|place| u32::try_from(place).ok()).take(HOT_MAX).collect()
    }

    /// Call when the addresses at which this node listens have changed. Another IP address means
    /// another network.
    fn on_addresses(&mut self, now: Instant, addresses: Vec<Address>) {
        let here = |address: &&Address| address.transport() != Transport::Relay;
        let ip = |addresses: &[Address]| -> BTreeSet<IpAddr> {
            addresses.iter().filter(here).filter_map(Address::ip).collect()
        };
        if !ip(&addresses).is_subset(&ip(&self.addresses)) {
            self.known.network_changed(now);
            self.dial_soon(now);
        }
        self.addresses = addresses;
        self.schedule.change(now, Due::Holdings);
    }

    /// Records conduct. Returns the end of a ban, if there is a new one.
    fn note(&mut self, now: Instant, peer: PeerId, conduct: Conduct) -> Option<Instant> {
        let ban = self.reputation.note(now, peer, conduct);
        self.counts.bans += u64::from(ban.is_some());
        ban
    }

    fn traffic_of(&mut self, peer: PeerId) -> &mut Traffic {
        if self.traffic.len() >= PEERS_REMEMBERED_MAX && !self.traffic.contains_key(&peer) {
            let least = self.traffic.iter().min_by_key(|(_, t)| t.bytes_in + t.bytes_out);
            if let Some(least) = least.map(|(peer, _)| *peer) {
                self.traffic.remove(&least);
            }
        }
        self.traffic.entry(peer).or_default()
    }
}

fn may_relay(announcements: &Announcements, shard: ShardId) -> bool {
    let size = announcements.manifest_size(shard);
    size.is_some_and(|size| size <= RELAYED_MANIFEST_BYTES_MAX)
}
