//! The loop that owns the libp2p swarm: one `select!` over its events, the
//! caller's commands and a tick. It never waits for a caller.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures::StreamExt;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{DialError, SwarmEvent};
use libp2p::{Swarm, gossipsub, identify, mdns};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::behaviour::{Behaviour, BehaviourEvent, setup};
use crate::handle::{Drops, Message, Peer, Peers};
use crate::ids::keypair;
use crate::options::{
    AGENT_BYTES_MAX, BANS_MAX, BOOTSTRAP_MAX, EXTERNAL_MAX, FOREIGN_BAN, GOSSIP_BYTES_MAX,
    IDLE_CONNECTION, NEGOTIATING_STREAMS_MAX, OUTBOX, Options, PEER_ADDRESSES_MAX, REDIAL_FIRST,
    REDIAL_MAX, TICK,
};
use crate::outbox::Outbox;
use crate::redial::Redial;
use crate::{Address, PeerId, SwarmError};

/// What a caller can ask of the loop.
pub(crate) enum Command {
    Publish { topic: String, data: Vec<u8> },
    Judge { id: gossipsub::MessageId, forwarder: PeerId, sound: bool },
    Dial { peer: PeerId, addresses: Vec<Address> },
    Disconnect { peer: PeerId },
    Ban { peer: PeerId, until: Instant },
    Shutdown { done: oneshot::Sender<()> },
}

/// Where the loop reports to.
pub(crate) struct Outputs {
    pub(crate) messages: mpsc::Sender<Message>,
    pub(crate) peers: watch::Sender<Peers>,
    pub(crate) listening: watch::Sender<Vec<Address>>,
    pub(crate) drops: Arc<Drops>,
}

type Started = Result<(libp2p_stream::Control, runtime::Handle), SwarmError>;

/// Body of the swarm's thread: a runtime of its own, the loop, and its end.
pub(crate) fn run_thread(
    options: Options,
    commands: mpsc::Receiver<Command>,
    outputs: Outputs,
    started: oneshot::Sender<Started>,
) {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            // The caller may have given up waiting; then nobody needs to know.
            let _ = started.send(Err(setup("its runtime", &error)));
            return;
        }
    };
    let done = runtime.block_on(async {
        let actor = match Actor::start(options, outputs) {
            Ok(actor) => actor,
            Err(error) => {
                let _ = started.send(Err(error));
                return None;
            }
        };
        let control = actor.swarm.behaviour().streams.new_control();
        if started.send(Ok((control, runtime::Handle::current()))).is_err() {
            return None;
        }
        actor.run(commands).await
    });
    // Connection tasks live in the runtime: only its end closes every socket.
    drop(runtime);
    if let Some(done) = done {
        let _ = done.send(());
    }
}

struct Actor {
    swarm: Swarm<Behaviour>,
    protocol_version: String,
    outputs: Outputs,
    peers: BTreeMap<PeerId, Peer>,
    redial: Redial,
    outbox: Outbox,
    bans: BTreeMap<PeerId, Instant>,
}

impl Actor {
    fn start(options: Options, outputs: Outputs) -> Result<Self, SwarmError> {
        let mut swarm = build(&options)?;
        for address in &options.listen {
            refuse_taken_port(address)?;
            swarm.listen_on(address.0.clone()).map_err(|error| SwarmError::Listen {
                address: address.clone(),
                reason: error.to_string(),
            })?;
        }
        if options.bootstrap.len() > BOOTSTRAP_MAX {
            warn!("only the first {BOOTSTRAP_MAX} bootstrap addresses are used");
        }
        let bootstrap = options.bootstrap.into_iter().take(BOOTSTRAP_MAX);
        Ok(Self {
            swarm,
            protocol_version: options.protocol_version,
            outputs,
            peers: BTreeMap::new(),
            redial: Redial::new(bootstrap, REDIAL_FIRST, REDIAL_MAX, Instant::now()),
            outbox: Outbox::new(OUTBOX),
            bans: BTreeMap::new(),
        })
    }

    /// Runs until told to stop or until every handle is gone.
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Option<oneshot::Sender<()>> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Finish local work before accepting remote.
                biased;
                command = commands.recv() => match command {
                    None => return None,
                    Some(Command::Shutdown { done }) => return Some(done),
                    Some(command) => self.on_command(command),
                },
                _ = tick.tick() => self.on_tick(Instant::now()),
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Publish { topic, data } => self.publish(topic, data),
            Command::Judge { id, forwarder, sound } => {
                let verdict = if sound {
                    gossipsub::MessageAcceptance::Accept
                } else {
                    gossipsub::MessageAcceptance::Reject
                };
                // False only if the message has left gossipsub's cache meanwhile.
                let _known = self.swarm.behaviour_mut().gossip.report_message_validation_result(
                    &id,
                    &forwarder.0,
                    verdict,
                );
            }
            Command::Dial { peer, addresses } => self.dial_peer(peer, addresses),
            Command::Disconnect { peer } => {
                // An error means that it is not connected, which is what was asked.
                let _ = self.swarm.disconnect_peer_id(peer.0);
            }
            Command::Ban { peer, until } => self.ban(peer, until),
            // Handled by the loop itself.
            Command::Shutdown { .. } => {}
        }
    }

    fn publish(&mut self, topic: String, data: Vec<u8>) {
        if data.len() > GOSSIP_BYTES_MAX {
            warn!(topic, bytes = data.len(), "publication larger than a gossip message; dropped");
            self.outputs.drops.publications.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let hash = gossipsub::IdentTopic::new(&topic).hash();
        if !try_publish(&mut self.swarm, hash, &data) && self.outbox.push(topic, data) {
            self.outputs.drops.publications.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn dial_peer(&mut self, peer: PeerId, addresses: Vec<Address>) {
        let addresses =
            addresses.into_iter().take(PEER_ADDRESSES_MAX).map(|address| address.0).collect();
        let dial = DialOpts::peer_id(peer.0)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .allocate_new_port()
            .build();
        self.dial(dial);
    }

    fn dial(&mut self, dial: impl Into<DialOpts>) {
        match self.swarm.dial(dial) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => debug!(%error, "dial refused"),
        }
    }

    fn on_tick(&mut self, now: Instant) {
        let swarm = &self.swarm;
        let due = self.redial.due(now, |peer| swarm.is_connected(&peer.0));
        for address in due {
            match address.peer() {
                Some(peer) => self.dial_peer(peer, vec![address]),
                None => self.dial(
                    DialOpts::unknown_peer_id().address(address.0).allocate_new_port().build(),
                ),
            }
        }
        let over: Vec<PeerId> =
            self.bans.iter().filter(|(_, until)| **until <= now).map(|(peer, _)| *peer).collect();
        for peer in over {
            self.unban(peer);
        }
        if !self.outbox.is_empty() {
            let swarm = &mut self.swarm;
            self.outbox.retry(|topic, data| {
                try_publish(swarm, gossipsub::IdentTopic::new(topic).hash(), data)
            });
        }
    }

    fn ban(&mut self, peer: PeerId, until: Instant) {
        if self.bans.len() >= BANS_MAX && !self.bans.contains_key(&peer) {
            let first = self.bans.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer);
            if let Some(first) = first {
                self.unban(first);
            }
        }
        self.bans.insert(peer, until);
        self.swarm.behaviour_mut().bans.block_peer(peer.0);
    }

    fn unban(&mut self, peer: PeerId) {
        self.bans.remove(&peer);
        self.swarm.behaviour_mut().bans.unblock_peer(peer.0);
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => {
                let peer = PeerId(peer_id);
                let remote = Address(endpoint.get_remote_address().clone());
                if endpoint.is_dialer() {
                    self.redial.connected(&remote, peer);
                }
                self.peers.entry(peer).or_insert_with(|| Peer {
                    remote: remote.without_peer(),
                    listens: Vec::new(),
                    agent: None,
                    connected_at: Instant::now(),
                    topics: BTreeSet::new(),
                });
                self.publish_peers();
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                debug!(peer = %peer_id, ?cause, "disconnected");
                self.peers.remove(&PeerId(peer_id));
                self.publish_peers();
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                debug!(?peer_id, %error, "dial failed");
                self.forget_own_address(&error);
            }
            SwarmEvent::NewListenAddr { .. }
            | SwarmEvent::ExpiredListenAddr { .. }
            | SwarmEvent::ExternalAddrConfirmed { .. }
            | SwarmEvent::ExternalAddrExpired { .. } => self.publish_listening(),
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                warn!(?addresses, ?reason, "a listener closed");
                self.publish_listening();
            }
            SwarmEvent::ListenerError { error, .. } => debug!(%error, "listener"),
            _ => {}
        }
    }

    /// A bootstrap address that turns out to be this node is not dialled again.
    fn forget_own_address(&mut self, error: &DialError) {
        if let DialError::LocalPeerId { address } = error {
            self.redial.forget_self(&Address(address.clone()));
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
                // Strict validation has already refused messages without an author.
                let Some(author) = message.source else { return };
                let message = Message {
                    topic: message.topic.into_string(),
                    author: PeerId(author),
                    forwarder: PeerId(propagation_source),
                    data: message.data,
                    id: message_id,
                };
                if self.outputs.messages.try_send(message).is_err() {
                    self.outputs.drops.messages.fetch_add(1, Ordering::Relaxed);
                }
            }
            BehaviourEvent::Gossip(gossipsub::Event::Subscribed { peer_id, topic, .. }) => {
                if let Some(peer) = self.peers.get_mut(&PeerId(peer_id)) {
                    peer.topics.insert(topic.into_string());
                    self.publish_peers();
                }
                // Somebody listens now: what waited can go out at once.
                self.on_tick(Instant::now());
            }
            BehaviourEvent::Gossip(gossipsub::Event::Unsubscribed { peer_id, topic, .. }) => {
                if let Some(peer) = self.peers.get_mut(&PeerId(peer_id)) {
                    peer.topics.remove(topic.as_str());
                    self.publish_peers();
                }
            }
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.on_identified(PeerId(peer_id), info);
            }
            BehaviourEvent::Ping(event) => {
                if let Err(error) = event.result {
                    debug!(peer = %event.peer, %error, "silent peer; closing its connection");
                    self.swarm.close_connection(event.connection);
                }
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    self.dial_peer(PeerId(peer), vec![Address(address)]);
                }
            }
            _ => {}
        }
    }

    fn on_identified(&mut self, peer: PeerId, info: identify::Info) {
        if info.protocol_version != self.protocol_version {
            info!(%peer, theirs = %shown(&info.protocol_version), "speaks another protocol; disconnecting");
            self.ban(peer, Instant::now() + FOREIGN_BAN);
            return;
        }
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.agent = Some(shown(&info.agent_version));
            let listens = info.listen_addrs.into_iter().take(PEER_ADDRESSES_MAX);
            entry.listens = listens.map(Address).collect();
            self.publish_peers();
        }
    }

    fn publish_peers(&self) {
        self.outputs.peers.send_replace(Arc::new(self.peers.clone()));
    }

    fn publish_listening(&self) {
        let own = PeerId(*self.swarm.local_peer_id());
        let addresses: BTreeSet<Address> = self
            .swarm
            .listeners()
            .chain(self.swarm.external_addresses())
            .map(|address| Address(address.clone()).with_peer(own))
            .collect();
        self.outputs.listening.send_replace(addresses.into_iter().collect());
    }
}

/// libp2p listens with SO_REUSEPORT, so that a second node on the same port would
/// silently take every other connection. A plain bind first tells.
fn refuse_taken_port(address: &Address) -> Result<(), SwarmError> {
    let Some(socket) = address.tcp_socket() else { return Ok(()) };
    if socket.port() == 0 {
        return Ok(());
    }
    std::net::TcpListener::bind(socket)
        .map(drop)
        .map_err(|error| SwarmError::Listen { address: address.clone(), reason: error.to_string() })
}

/// True if the message is out, or can never be.
fn try_publish(swarm: &mut Swarm<Behaviour>, topic: gossipsub::TopicHash, data: &[u8]) -> bool {
    match swarm.behaviour_mut().gossip.publish(topic, data) {
        Ok(_) | Err(gossipsub::PublishError::Duplicate) => true,
        Err(
            gossipsub::PublishError::NoPeersSubscribedToTopic
            | gossipsub::PublishError::AllQueuesFull(_),
        ) => false,
        Err(error) => {
            warn!(%error, "cannot publish");
            true
        }
    }
}

fn build(options: &Options) -> Result<Swarm<Behaviour>, SwarmError> {
    let keys = keypair(options.seed);
    let transport = crate::transport::build(&keys, options)?;
    let behaviour = Behaviour::new(&keys, options)?;
    let config = libp2p::swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE_CONNECTION)
        .with_max_negotiating_inbound_streams(NEGOTIATING_STREAMS_MAX);
    let own = keys.public().to_peer_id();
    let mut swarm = Swarm::new(transport, behaviour, own, config);
    if options.external.len() > EXTERNAL_MAX {
        warn!("only the first {EXTERNAL_MAX} external addresses are announced");
    }
    for address in options.external.iter().take(EXTERNAL_MAX) {
        swarm.add_external_address(address.without_peer().0);
    }
    Ok(swarm)
}

/// A peer's text, cut to a bounded length and without control characters.
fn shown(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars().filter(|c| !c.is_control()) {
        if out.len() + character.len_utf8() > AGENT_BYTES_MAX {
            break;
        }
        out.push(character);
    }
    out
}
