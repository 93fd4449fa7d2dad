//! The caller's side: commands in, state and messages out.
//!
//! State (peers, listen addresses) is published through watches, so it cannot be
//! missed. Gossip messages come through a bounded queue and may be dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::StreamProtocol;
use tokio::sync::{mpsc, oneshot, watch};

use crate::activity::Activities;
use crate::actor::{self, Command};
use crate::convert::{self, keypair};
use crate::gate::Refusal;
use crate::options::{
    COMMAND_QUEUE, INCOMING_QUEUE, MESSAGE_QUEUE, NOTICE_QUEUE, OPEN_TIMEOUT, OPEN_TIMEOUTS_MAX,
    Options, REFUSAL_QUEUE, SHUTDOWN_TIMEOUT,
};
use crate::paths::Path;
use crate::reach::Reach;
use crate::redial::Bootstrap;
use crate::stream::Stream;
use crate::{Address, PeerId, SwarmError};

/// A connected peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The remote address of its oldest direct connection; without one, the relay's address
    /// with `/p2p-circuit`.
    pub remote: Address,
    /// Whether the connection is direct or relayed.
    pub path: Path,
    /// The address at which this node last dialled it successfully. Excludes hole-punched
    /// addresses, which cannot be reused.
    pub dialled: Option<Address>,
    /// Whether it offers to be a relay.
    pub offers_relay: bool,
    /// Its listen addresses by its own account, once it has identified itself (at most 32).
    pub listens: Vec<Address>,
    /// Its `NAME/VERSION`, once it has identified itself.
    pub agent: Option<String>,
    pub connected_at: Instant,
    /// The topics of ours that it has subscribed to.
    pub topics: BTreeSet<String>,
}

/// Every connected peer.
pub type Peers = Arc<BTreeMap<PeerId, Peer>>;

/// A gossip message whose author's signature was checked. It is forwarded to other
/// peers only after [`SwarmHandle::judge`] has accepted it.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    /// The peer that wrote and signed it.
    pub author: PeerId,
    /// The peer that sent it to this node.
    pub forwarder: PeerId,
    pub data: Vec<u8>,
    pub(crate) id: libp2p::gossipsub::MessageId,
}

/// What the swarm noticed of peers that are not connected, or that are two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The local network says that a peer is at these addresses.
    Found { peer: PeerId, addresses: Vec<Address> },
    /// A dial of a peer failed, or the peer was refused. `is_stranger` if it cannot take part in
    /// this swarm: it speaks another protocol, or has no key.
    NotReached { peer: PeerId, reason: String, is_stranger: bool },
    /// A node with this node's own identity answers at this address, or dialled from it.
    Twin { address: Address },
    /// Two nodes of one identity are connected, from these places.
    Doubled { peer: PeerId, places: [Address; 2] },
    /// A peer says that two nodes use this node's identity.
    ToldOfTwin { by: PeerId },
}

/// What the swarm reports.
#[derive(Debug)]
pub struct SwarmEvents {
    pub messages: mpsc::Receiver<Message>,
    pub peers: watch::Receiver<Peers>,
    /// Peers that a private swarm's gate refused, or whose gate refused this node.
    pub refusals: mpsc::Receiver<Refusal>,
    /// Listen addresses, each ending in `/p2p/` and this node's id.
    pub listening: watch::Receiver<Vec<Address>>,
    /// How others reach this node.
    pub reach: watch::Receiver<Reach>,
    /// How the bootstrap addresses fare.
    pub bootstrap: watch::Receiver<Vec<Bootstrap>>,
    /// What is noticed of peers that are not connected.
    pub notices: mpsc::Receiver<Notice>,
}

/// A stream that a peer opened.
pub struct IncomingStream {
    pub peer: PeerId,
    pub stream: Stream,
}

/// The streams that peers open for one protocol.
pub type IncomingStreams = mpsc::Receiver<IncomingStream>;

/// What was dropped because a bounded queue was full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub messages_dropped: u64,
    pub publications_dropped: u64,
    pub streams_dropped: u64,
}

#[derive(Default)]
pub(crate) struct Drops {
    pub(crate) messages: AtomicU64,
    pub(crate) publications: AtomicU64,
    pub(crate) streams: AtomicU64,
}

/// Opens and accepts streams, over direct connections and over relayed ones.
#[derive(Clone)]
pub(crate) struct Controls {
    pub(crate) direct: libp2p_stream::Control,
    pub(crate) relayed: libp2p_stream::Control,
}

/// Commands the swarm. Cheap to clone; the swarm stops when the last clone is dropped.
#[derive(Clone)]
pub struct SwarmHandle {
    peer: PeerId,
    commands: mpsc::Sender<Command>,
    streams: Controls,
    /// The connected peers and their paths.
    peers: watch::Receiver<Peers>,
    runtime: tokio::runtime::Handle,
    drops: Arc<Drops>,
    activities: Activities,
}

impl SwarmHandle {
    /// Starts a swarm on a thread of its own. Every address in `options.listen` is
    /// bound when this returns. The connections run in one single-threaded runtime:
    /// that was measured faster than a shared one, and inference on the caller's
    /// threads cannot starve pings.
    pub async fn spawn(options: Options) -> Result<(Self, SwarmEvents), SwarmError> {
        let peer = convert::peer(keypair(options.seed).public().to_peer_id());
        let (commands, command_queue) = mpsc::channel(COMMAND_QUEUE);
        let (messages_in, messages) = mpsc::channel(MESSAGE_QUEUE);
        let (peers_in, peers) = watch::channel(Peers::default());
        let (listening_in, listening) = watch::channel(Vec::new());
        let (refusals_in, refusals) = mpsc::channel(REFUSAL_QUEUE);
        let (reach_in, reach) = watch::channel(Reach::default());
        let (bootstrap_in, bootstrap) = watch::channel(Vec::new());
        let (notices_in, notices) = mpsc::channel(NOTICE_QUEUE);
        let (started_in, started) = oneshot::channel();
        let drops = Arc::new(Drops::default());
        let activities = Activities::default();
        let outputs = actor::Outputs {
            messages: messages_in,
            peers: peers_in,
            listening: listening_in,
            reach: reach_in,
            bootstrap: bootstrap_in,
            refusals: refusals_in,
            notices: notices_in,
            drops: drops.clone(),
            activities: activities.clone(),
        };
        thread::Builder::new()
            .name("swarm".into())
            .spawn(move || actor::run_thread(options, command_queue, outputs, started_in))
            .map_err(|error| crate::behaviour::setup("its thread", &error))?;
        let (streams, runtime) = started.await.map_err(|_| SwarmError::Closed)??;
        let handle =
            Self { peer, commands, streams, peers: peers.clone(), runtime, drops, activities };
        let events =
            SwarmEvents { messages, peers, refusals, listening, reach, bootstrap, notices };
        Ok((handle, events))
    }

    /// This node's id.
    pub const fn peer(&self) -> PeerId {
        self.peer
    }

    /// Publishes at most 64 KiB on one of `Options::topics`. Kept and retried while
    /// nobody is subscribed. Never waits.
    pub fn publish(&self, topic: &str, data: Vec<u8>) -> Result<(), SwarmError> {
        self.command(Command::Publish { topic: topic.to_owned(), data })
    }

    /// Takes part in a further topic, whose name begins with `Options::topic_prefix`.
    pub fn join(&self, topic: &str) -> Result<(), SwarmError> {
        self.command(Command::Join { topic: topic.to_owned() })
    }

    /// Takes part in a further topic no more.
    pub fn leave(&self, topic: &str) -> Result<(), SwarmError> {
        self.command(Command::Leave { topic: topic.to_owned() })
    }

    /// Says something on a further topic to those that are subscribed now.
    pub fn tell(&self, topic: &str, data: Vec<u8>) -> Result<(), SwarmError> {
        self.command(Command::Tell { topic: topic.to_owned(), data })
    }

    /// Reports whether a message is valid. If so it is forwarded, otherwise its forwarder is
    /// penalised.
    pub fn judge(&self, message: &Message, sound: bool) -> Result<(), SwarmError> {
        self.command(Command::Judge { id: message.id.clone(), forwarder: message.forwarder, sound })
    }

    /// Dials a peer unless it is connected or being dialled.
    pub fn dial(&self, peer: PeerId, addresses: Vec<Address>) -> Result<(), SwarmError> {
        self.command(Command::Dial { peer, addresses })
    }

    /// Tells the nodes that are connected under this id that there are two of them.
    pub fn tell_twins(&self, peer: PeerId) -> Result<(), SwarmError> {
        self.command(Command::TellTwins { peer })
    }

    /// Closes every connection to a peer.
    pub fn disconnect(&self, peer: PeerId) -> Result<(), SwarmError> {
        self.command(Command::Disconnect { peer })
    }

    /// Disconnects a peer and refuses it until `until`.
    pub fn ban(&self, peer: PeerId, until: Instant) -> Result<(), SwarmError> {
        self.command(Command::Ban { peer, until })
    }

    /// Opens a stream, over a direct connection if there is one. Dials the peer if its address
    /// is known. The stream knows whether it is relayed.
    pub async fn open_stream(&self, peer: PeerId, protocol: &str) -> Result<Stream, SwarmError> {
        let protocol = parse_protocol(protocol)?;
        let relayed = self.peers.borrow().get(&peer).is_some_and(|peer| !peer.path.is_direct());
        let Controls { direct, relayed: circuits } = &self.streams;
        // A clone, because one control opens one stream at a time.
        let mut control = if relayed { circuits.clone() } else { direct.clone() };
        let activity = self.activities.of(peer);
        let mut opening = pin!(control.open_stream(convert::id(peer), protocol));
        for _ in 0..OPEN_TIMEOUTS_MAX {
            match timeout(OPEN_TIMEOUT, &mut opening).await {
                Some(Ok(stream)) => return Ok(Stream::new(stream, relayed, activity)),
                Some(Err(error)) => {
                    return Err(SwarmError::Open { peer, reason: error.to_string() });
                }
                // It may wait behind what comes on other streams.
                None if activity.has_read(OPEN_TIMEOUT) => {}
                None => break,
            }
        }
        let reason = format!("no answer within {} s", OPEN_TIMEOUT.as_secs());
        Err(SwarmError::Open { peer, reason })
    }

    /// Serves a protocol: streams that peers open for it arrive in the returned
    /// queue. If the queue is full, a stream is reset and counted.
    pub fn accept(&self, protocol: &str) -> Result<IncomingStreams, SwarmError> {
        let name = parse_protocol(protocol)?;
        let (sender, receiver) = mpsc::channel(INCOMING_QUEUE);
        let Controls { mut direct, mut relayed } = self.streams.clone();
        for (control, relayed) in [(&mut direct, false), (&mut relayed, true)] {
            let mut incoming = control
                .accept(name.clone())
                .map_err(|_| SwarmError::AlreadyServed(protocol.to_owned()))?;
            let (sender, drops) = (sender.clone(), self.drops.clone());
            let activities = self.activities.clone();
            // libp2p-stream drops bursts when nobody polls, so this task does nothing else.
            self.runtime.spawn(async move {
                loop {
                    let next = tokio::select! {
                        next = incoming.next() => next,
                        () = sender.closed() => break,
                    };
                    let Some((peer, stream)) = next else { break };
                    let peer = convert::peer(peer);
                    let stream = Stream::new(stream, relayed, activities.of(peer));
                    let stream = IncomingStream { peer, stream };
                    if sender.try_send(stream).is_err() {
                        drops.streams.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(receiver)
    }

    /// What was dropped so far.
    pub fn counters(&self) -> Counters {
        Counters {
            messages_dropped: self.drops.messages.load(Ordering::Relaxed),
            publications_dropped: self.drops.publications.load(Ordering::Relaxed),
            streams_dropped: self.drops.streams.load(Ordering::Relaxed),
        }
    }

    /// Closes every connection and listener. Returns when the swarm has ended.
    pub async fn shutdown(&self) {
        let (done, ended) = oneshot::channel();
        if self.commands.send(Command::Shutdown { done }).await.is_ok() {
            // An error means that the loop has already ended, which is the goal.
            let _ = timeout(SHUTDOWN_TIMEOUT, ended).await;
        }
    }

    fn command(&self, command: Command) -> Result<(), SwarmError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SwarmError::Busy,
            mpsc::error::TrySendError::Closed(_) => SwarmError::Closed,
        })
    }
}

fn parse_protocol(protocol: &str) -> Result<StreamProtocol, SwarmError> {
    StreamProtocol::try_from_owned(protocol.to_owned())
        .map_err(|_| SwarmError::BadProtocol(protocol.to_owned()))
}

async fn timeout<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    tokio::time::timeout(limit, future).await.ok()
}
