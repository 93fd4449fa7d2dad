//! The core behind one lock, and the code that performs its actions.
//!
//! The lock is a plain mutex. It is held for a decision and its actions, none of which waits, and
//! never across an await. Actions are performed under it, so that they happen in the order in which
//! they were decided, whichever threads report events.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use doppler_swarm::{Message, Notice, Peers, SwarmHandle};
use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, info, warn};

use super::core::{
    Action, Ask, Contact, Core, Counts, Event, Load, MessageId, ReadId, Refused, RequestId, Sight,
    Source, TOPIC_PREFIX, Twin,
};
use super::handle::reached;
use super::limiter::Limiter;
use super::options::ORDERS_MAX;
use super::shard_client::Client;
use doppler_store::signature::SignedModel;
use doppler_store::{ReadError, ReadRequest};

/// An order to a read.
#[derive(Debug)]
pub(super) enum Order {
    Ask { ask: Ask, may_relay: bool },
    Keep { request: RequestId, end: u64 },
    Stop { request: RequestId },
    Abandon { request: RequestId },
    Discard { request: RequestId },
    End(Result<(), ReadError>),
}

/// The progress of requests, and whether this node's own limit sets the pace.
struct Progress {
    proved: BTreeMap<(ReadId, RequestId), Arc<AtomicU64>>,
    download: Arc<Limiter>,
}

impl Sight for Progress {
    fn proved(&self, read: ReadId, request: RequestId) -> u64 {
        self.proved.get(&(read, request)).map_or(0, |proved| proved.load(Ordering::Relaxed))
    }

    fn is_throttled(&self, now: Instant) -> bool {
        self.download.is_the_brake(now)
    }
}

/// Everything behind the lock.
struct Inner {
    core: Core,
    progress: Progress,
    /// The queue from which each read takes its orders.
    mailboxes: BTreeMap<ReadId, mpsc::Sender<Order>>,
    /// Reads begun so far.
    reads: ReadId,
    /// The time at which the actor will wake, at the latest.
    armed: Instant,
    peers: Peers,
    /// Streams of peers that are served now, and that were refused.
    streams: usize,
    refused_streams: u64,
    is_closed: bool,
}

/// What is reported once the lock is released.
#[derive(Default)]
struct News {
    changed: bool,
    models: bool,
    refused: Option<Refused>,
}

/// The mesh's state, and the notifications of its changes.
pub(super) struct Shared {
    inner: Mutex<Inner>,
    swarm: SwarmHandle,
    pub(super) client: Client,
    topic: String,
    changed: watch::Sender<u64>,
    models: watch::Sender<Arc<Vec<SignedModel>>>,
    /// Notified when the core wants to be woken earlier than the actor would wake.
    earlier: Notify,
}

impl Shared {
    pub(super) fn new(
        core: Core,
        swarm: SwarmHandle,
        client: Client,
        topic: String,
        download: Arc<Limiter>,
    ) -> Self {
        let armed = core.next_wake();
        let inner = Inner {
            core,
            progress: Progress { proved: BTreeMap::new(), download },
            mailboxes: BTreeMap::new(),
            reads: 0,
            armed,
            peers: Peers::default(),
            streams: 0,
            refused_streams: 0,
            is_closed: false,
        };
        Self {
            inner: Mutex::new(inner),
            swarm,
            client,
            topic,
            changed: watch::Sender::new(0),
            models: watch::Sender::new(Arc::default()),
            earlier: Notify::new(),
        }
    }

    /// A panic elsewhere leaves counts off by one at worst, so a poisoned lock is used anyway.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the core what happened, and performs its actions.
    ///
    /// # Errors
    /// If it refuses a publication or a registration.
    pub(super) fn tell(&self, event: Event) -> Result<(), Refused> {
        self.act(self.lock(), event, None)
    }

    /// Tells the core of an event that it never refuses.
    pub(super) fn note(&self, event: Event) {
        let refused = self.tell(event);
        debug_assert!(refused.is_ok(), "only publications and registrations are refused");
    }

    /// Tells the core of a gossip message, and accepts or rejects it as the core decides.
    pub(super) fn hear(&self, mut message: Message) {
        let data = std::mem::take(&mut message.data);
        let (topic, word) = (message.topic.as_str().into(), data.into());
        let event = Event::Gossip { message: 0, topic, author: message.author, word };
        let refused = self.act(self.lock(), event, Some((0, &message)));
        debug_assert!(refused.is_ok(), "only publications and registrations are refused");
    }

    /// Call when the time has come until which the actor slept.
    pub(super) fn wake(&self) {
        self.note(Event::Time);
    }

    /// Sets the connected peers.
    pub(super) fn set_peers(&self, peers: Peers) {
        let contact = |peer: &doppler_swarm::Peer| Contact {
            is_direct: peer.path.is_direct(),
            listens: peer.topics.contains(&self.topic),
            reached: reached(peer),
            topics: model_topics(&peer.topics),
        };
        let contacts = peers.iter().map(|(id, peer)| (*id, contact(peer))).collect();
        let mut inner = self.lock();
        inner.peers = peers;
        let refused = self.act(inner, Event::Contacts(contacts), None);
        debug_assert!(refused.is_ok(), "only publications and registrations are refused");
    }

    /// Call when the swarm has noticed something about a peer that is not connected.
    pub(super) fn heed(&self, notice: Notice) {
        match notice {
            Notice::Found { peer, addresses } => {
                self.note(Event::Known { peer, source: Source::Found, addresses });
            }
            Notice::NotReached { peer, reason, is_stranger } => {
                self.note(Event::NotReached { peer, reason, is_stranger });
            }
            Notice::Twin { address } => {
                self.note(Event::Twin { peer: self.swarm.peer(), places: vec![address] });
            }
            Notice::ToldOfTwin { by } => self.note(Event::ToldOfTwin { by }),
            Notice::Doubled { peer, places } => {
                self.note(Event::Twin { peer, places: places.into() });
            }
        }
    }

    /// Begins a read. Its orders arrive on the returned queue, which closes when the mesh stops.
    pub(super) fn begin(&self, request: ReadRequest) -> (ReadId, mpsc::Receiver<Order>) {
        let mut inner = self.lock();
        inner.reads += 1;
        let read = inner.reads;
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        if !inner.is_closed {
            inner.mailboxes.insert(read, sender);
            let refused = self.act(inner, Event::Read { read, request }, None);
            debug_assert!(refused.is_ok(), "only publications and registrations are refused");
        }
        (read, orders)
    }

    /// From here on, decisions that depend on a request's progress read it from `proved`.
    pub(super) fn watch(&self, read: ReadId, request: RequestId, proved: Arc<AtomicU64>) {
        let mut inner = self.lock();
        if inner.mailboxes.contains_key(&read) {
            inner.progress.proved.insert((read, request), proved);
        }
    }

    /// Ends every read, because nothing will wake the core any more.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        inner.mailboxes.clear();
    }

    /// When the actor should wake the core, unless [`Self::earlier`] resolves before.
    pub(super) fn arm(&self) -> Instant {
        let mut inner = self.lock();
        inner.armed = inner.core.next_wake();
        inner.armed
    }

    /// Waits until the core wants to be woken earlier than [`Self::arm`] said.
    pub(super) async fn earlier(&self) {
        self.earlier.notified().await;
    }

    /// Looks at the core and the connected peers.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Core, &Peers) -> T) -> T {
        let inner = self.lock();
        look(&inner.core, &inner.peers)
    }

    /// Bytes of an object that reads under way have proved.
    pub(super) fn coming(&self, shard: doppler_ids::ShardId) -> u64 {
        let inner = self.lock();
        inner.core.coming(shard, &inner.progress)
    }

    pub(super) fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts { refused_streams: inner.refused_streams, ..inner.core.counts() }
    }

    pub(super) fn load(&self) -> Load {
        let inner = self.lock();
        Load { streams: inner.streams, reads: inner.mailboxes.len(), ..inner.core.load() }
    }

    pub(super) fn stream_opened(&self) {
        self.lock().streams += 1;
    }

    pub(super) fn stream_closed(&self) {
        self.lock().streams -= 1;
    }

    pub(super) fn stream_refused(&self) {
        self.lock().refused_streams += 1;
        self.ring();
    }

    /// Wakes whoever watches the mesh.
    pub(super) fn ring(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    pub(super) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn models(&self) -> watch::Receiver<Arc<Vec<SignedModel>>> {
        self.models.subscribe()
    }

    fn act(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        event: Event,
        message: Option<(MessageId, &Message)>,
    ) -> Result<(), Refused> {
        let over = match &event {
            Event::Answered { read, request, .. } => Some((*read, *request..=*request)),
            Event::Dropped { read } => Some((*read, 0..=RequestId::MAX)),
            _ => None,
        };
        let is_dropped = matches!(event, Event::Dropped { .. });
        let Inner { core, progress, mailboxes, .. } = &mut *inner;
        let actions = core.on(Instant::now(), event, progress);
        if let Some((read, requests)) = over {
            progress.forget(read, *requests.start(), *requests.end());
            if is_dropped {
                mailboxes.remove(&read);
            }
        }
        let mut news = News::default();
        for action in actions {
            self.perform(&mut inner, action, message, &mut news);
        }
        let wake = inner.core.next_wake();
        if wake < inner.armed {
            inner.armed = wake;
            self.earlier.notify_one();
        }
        // Done under the lock, so that an older list never replaces a newer one.
        if news.models {
            self.models.send_replace(Arc::new(inner.core.announced()));
        }
        drop(inner);
        if news.changed {
            self.ring();
        }
        news.refused.map_or(Ok(()), Err)
    }

    /// Never waits for a full command queue of the swarm: announcements are repeated in the next
    /// round, dials are tried again, a message is merely not forwarded, and a banned peer is not
    /// chosen any more.
    fn perform(
        &self,
        inner: &mut Inner,
        action: Action,
        message: Option<(MessageId, &Message)>,
        news: &mut News,
    ) {
        match action {
            Action::Publish(data) => {
                if let Err(error) = self.swarm.publish(&self.topic, data) {
                    debug!(%error, "not published");
                }
            }
            Action::Tell { topic, data } => {
                let _ = self.swarm.tell(&topic, data);
            }
            Action::Join { topic, model } => {
                debug!(model = %model.short(), "joins the model's topic");
                let _ = self.swarm.join(&topic);
            }
            Action::Leave(topic) => {
                let _ = self.swarm.leave(&topic);
            }
            Action::Judge { message: id, is_sound } => {
                if let Some((_, message)) = message.filter(|(known, _)| *known == id) {
                    let _ = self.swarm.judge(message, is_sound);
                }
            }
            Action::Dial { peer, addresses } => {
                let _ = self.swarm.dial(peer, addresses);
            }
            Action::Ban { peer, until, shard, detail } => {
                warn!(%peer, shard = %shard.short(), %detail, "sent wrong bytes; banned");
                self.client.forget(peer);
                let _ = self.swarm.ban(peer, until);
            }
            Action::Warn(twin) => {
                let is_own = twin.peer == self.swarm.peer();
                warn!("{}", describe(&twin, is_own));
                news.changed = true;
            }
            Action::TellTwins(peer) => {
                let _ = self.swarm.tell_twins(peer);
            }
            Action::ForgetStreams(peer) => self.client.forget(peer),
            Action::Ask { ask, may_relay } => inner.post(ask.read, Order::Ask { ask, may_relay }),
            Action::Keep { read, request, end } => inner.post(read, Order::Keep { request, end }),
            Action::Stop { read, request } => inner.post(read, Order::Stop { request }),
            Action::Abandon { read, request } => {
                inner.progress.forget(read, request, request);
                inner.post(read, Order::Abandon { request });
            }
            Action::Discard { read, request } => inner.post(read, Order::Discard { request }),
            Action::End { read, result } => {
                inner.progress.forget(read, 0, RequestId::MAX);
                inner.post(read, Order::End(result));
                inner.mailboxes.remove(&read);
            }
            Action::Learned { signed, is_own } => {
                if !is_own {
                    info!(model = %signed.model.short(), name = signed.name, "learned of a model");
                }
                news.models = true;
            }
            Action::Forgot(model) => {
                debug!(model = %model.short(), "forgotten: nobody holds it or speaks of it");
                news.models = true;
            }
            Action::Refuse(refused) => news.refused = Some(refused),
            Action::Changed => news.changed = true,
        }
    }
}

impl Inner {
    /// If a read's queue is full, which it should never be, the read ends.
    fn post(&mut self, read: ReadId, order: Order) {
        let sent = self.mailboxes.get(&read).map(|mailbox| mailbox.try_send(order));
        if matches!(sent, Some(Err(_))) {
            self.mailboxes.remove(&read);
        }
    }
}

impl Progress {
    fn forget(&mut self, read: ReadId, first: RequestId, last: RequestId) {
        let gone = self.proved.range((read, first)..=(read, last));
        for key in gone.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.proved.remove(&key);
        }
    }
}

/// The topics of models among those that a peer takes part in.
fn model_topics(topics: &BTreeSet<String>) -> Vec<Arc<str>> {
    let topics = topics.iter().filter(|topic| topic.starts_with(TOPIC_PREFIX));
    topics.map(|topic| topic.as_str().into()).collect()
}

/// Describes two nodes with one identity, and what to do about it.
pub(super) fn describe(twin: &Twin, is_own: bool) -> String {
    let places: Vec<&str> =
        twin.places.iter().map(String::as_str).filter(|place| !place.is_empty()).collect();
    let places = match &places[..] {
        [] => String::new(),
        places => format!(" (at {})", places.join(" and ")),
    };
    let cure = "stop one of them and delete identity.key in its data directory: it makes a new \
                identity when it starts again";
    match (is_own, twin.told_by) {
        (false, _) => format!(
            "two nodes use the identity {}{places}; its data directory was copied. Whoever runs \
             them should {cure}",
            twin.peer
        ),
        (true, None) => format!(
            "another node{places} uses this node's identity, {}; the data directory was copied. \
             One of the two disturbs the other: {cure}",
            twin.peer
        ),
        (true, Some(peer)) => format!(
            "peer {peer} sees two nodes that use this node's identity, {}; the data directory was \
             copied. One of the two disturbs the other: {cure}",
            twin.peer
        ),
    }
}
