//! The loop that owns the libp2p swarm: one `select!` over its events, the
//! caller's commands and a tick. It never waits for a caller.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures::StreamExt;
use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError, SwarmEvent};
use libp2p::{Multiaddr, StreamProtocol, Swarm, gossipsub, identify, mdns, ping};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::activity::Activities;
use crate::behaviour::{Behaviour, BehaviourEvent, setup};
use crate::convert::{self, keypair};
use crate::dials::Dials;
use crate::gate::{Refusal, decline_all};
use crate::handle::{Controls, Drops, Message, Notice, Peer, Peers};
use crate::key::KEY_PROTOCOL;
use crate::nat::Nat;
use crate::options::{
    AGENT_BYTES_MAX, BANS_MAX, BOOTSTRAP_MAX, BOOTSTRAP_PATIENCE, DIALS_WAITING_MAX, EXTERNAL_MAX,
    FOREIGN_BAN, GOSSIP_BYTES_MAX, HEAD_START, IDLE_CONNECTION, KEY_BAN, LINGER,
    NEGOTIATING_STREAMS_MAX, OUTBOX, Options, PEER_ADDRESSES_MAX, REASON_BYTES_MAX, REDIAL,
    REFUSAL_LOG_EVERY, REFUSAL_QUEUE, RELAYED_GRACE, RUNS_EVERY, TICK,
};
use crate::outbox::Outbox;
use crate::paths::{Path, Paths};
use crate::reach::Reach;
use crate::redial::{Bootstrap, Met, Redial};
use crate::runs::{Runs, TWIN_PROTOCOL, hear_of_twins, split_run, tell_twins};
use crate::selves::{End, Selves};
use crate::{Address, PeerId, SwarmError, Transport};

/// The commands that callers send to the loop.
pub(crate) enum Command {
    Publish { topic: String, data: Vec<u8> },
    Join { topic: String },
    Leave { topic: String },
    Tell { topic: String, data: Vec<u8> },
    Judge { id: gossipsub::MessageId, forwarder: PeerId, sound: bool },
    Dial { peer: PeerId, addresses: Vec<Address> },
    Disconnect { peer: PeerId },
    TellTwins { peer: PeerId },
    Ban { peer: PeerId, until: Instant },
    Shutdown { done: oneshot::Sender<()> },
}

/// The channels on which the loop reports.
pub(crate) struct Outputs {
    pub(crate) messages: mpsc::Sender<Message>,
    pub(crate) peers: watch::Sender<Peers>,
    pub(crate) listening: watch::Sender<Vec<Address>>,
    pub(crate) reach: watch::Sender<Reach>,
    pub(crate) bootstrap: watch::Sender<Vec<Bootstrap>>,
    pub(crate) refusals: mpsc::Sender<Refusal>,
    pub(crate) notices: mpsc::Sender<Notice>,
    pub(crate) drops: Arc<Drops>,
    pub(crate) activities: Activities,
}

/// The most threads beside the swarm's own.
const BLOCKING_THREADS_MAX: usize = 4;

type Started = Result<(Controls, runtime::Handle), SwarmError>;

/// The body of the swarm's thread: creates a runtime, runs the loop, and shuts both down.
pub(crate) fn run_thread(
    options: Options,
    commands: mpsc::Receiver<Command>,
    outputs: Outputs,
    started: oneshot::Sender<Started>,
) {
    let mut builder = runtime::Builder::new_current_thread();
    // WebRTC hands every packet to a blocking thread, and without a bound uses one per packet.
    builder.enable_all().max_blocking_threads(BLOCKING_THREADS_MAX);
    let runtime = match builder.build() {
        Ok(runtime) => runtime,
        Err(error) => {
            // If the caller has stopped waiting, nobody needs the error.
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
        let behaviour = actor.swarm.behaviour();
        let (direct, relayed) = (&behaviour.streams, &behaviour.relayed_streams);
        let controls = Controls { direct: direct.new_control(), relayed: relayed.new_control() };
        if started.send(Ok((controls, runtime::Handle::current()))).is_err() {
            return None;
        }
        actor.run(commands).await
    });
    // Connection tasks live in the runtime, so only dropping it closes every socket.
    drop(runtime);
    if let Some(done) = done {
        let _ = done.send(());
    }
}

struct Actor {
    swarm: Swarm<Behaviour>,
    protocol_version: String,
    /// Those that it was started with.
    topics: Vec<String>,
    outputs: Outputs,
    peers: BTreeMap<PeerId, Peer>,
    redial: Redial,
    outbox: Outbox,
    bans: BTreeMap<PeerId, Instant>,
    dials: Dials,
    paths: Paths,
    /// Pings in a row that failed, by connection.
    pings_lost: HashMap<ConnectionId, u32>,
    selves: Selves,
    runs: Runs,
    /// Connections are looked at for two runs of one peer this often.
    runs_at: Instant,
    nat: Nat,
    /// The machine's addresses at which it listens.
    here: BTreeSet<IpAddr>,
    /// Whether it listens on more than loopback.
    listens_beyond_loopback: bool,
    /// Outgoing connections that were dialled from a listening port.
    reused: HashSet<ConnectionId>,
    refusals: mpsc::Receiver<Refusal>,
    warned_at: Option<Instant>,
}

impl Actor {
    fn start(options: Options, outputs: Outputs) -> Result<Self, SwarmError> {
        let (refusals_in, refusals) = mpsc::channel(REFUSAL_QUEUE);
        let mut swarm = build(&options, refusals_in.clone(), &outputs.activities)?;
        if options.swarm_key.is_none() {
            let behaviour = swarm.behaviour();
            for half in [&behaviour.streams, &behaviour.relayed_streams] {
                let asked = half.new_control().accept(StreamProtocol::new(KEY_PROTOCOL));
                let asked =
                    asked.map_err(|_| SwarmError::AlreadyServed(KEY_PROTOCOL.to_owned()))?;
                tokio::spawn(decline_all(asked, refusals_in.clone()));
            }
        }
        let told = swarm.behaviour().streams.new_control().accept(TWIN_PROTOCOL);
        let told = told.map_err(|_| SwarmError::AlreadyServed(TWIN_PROTOCOL.to_string()))?;
        tokio::spawn(hear_of_twins(told, outputs.notices.clone()));
        listen(&mut swarm, &options.listen)?;
        let mut nat = Nat::new(&options, outputs.reach.clone());
        nat.offer(&mut swarm);
        if options.bootstrap.len() > BOOTSTRAP_MAX {
            warn!("only the first {BOOTSTRAP_MAX} bootstrap addresses are used");
        }
        let bootstrap = options.bootstrap.into_iter().take(BOOTSTRAP_MAX);
        Ok(Self {
            swarm,
            protocol_version: options.protocol_version,
            topics: options.topics,
            outputs,
            peers: BTreeMap::new(),
            redial: Redial::new(bootstrap, REDIAL, BOOTSTRAP_PATIENCE, Instant::now()),
            outbox: Outbox::new(OUTBOX),
            bans: BTreeMap::new(),
            dials: Dials::new(HEAD_START, DIALS_WAITING_MAX),
            paths: Paths::new(RELAYED_GRACE),
            pings_lost: HashMap::new(),
            selves: Selves::default(),
            runs: Runs::default(),
            runs_at: Instant::now(),
            nat,
            here: BTreeSet::new(),
            listens_beyond_loopback: options.listen.iter().any(|address| !address.is_loopback()),
            reused: HashSet::new(),
            refusals,
            warned_at: None,
        })
    }

    /// Runs until it is told to stop or every handle is dropped.
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Option<oneshot::Sender<()>> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Finish local work before accepting remote.
                biased;
                command = commands.recv() => match command {
                    None => return None,
                    Some(Command::Shutdown { done }) => {
                        self.linger().await;
                        self.nat.unmap().await;
                        return Some(done);
                    }
                    Some(command) => self.on_command(command),
                },
                Some(refusal) = self.refusals.recv() => self.on_refusal(refusal),
                mapped = self.nat.mapping() => self.nat.on_mapping(&mut self.swarm, &mapped),
                _ = tick.tick() => self.on_tick(Instant::now()),
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
    }

    /// What was published last leaves before the connections close.
    async fn linger(&mut self) {
        if self.peers.is_empty() {
            return;
        }
        let end = tokio::time::Instant::now() + LINGER;
        while let Ok(event) = tokio::time::timeout_at(end, self.swarm.select_next_some()).await {
            self.on_event(event);
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Publish { topic, data } => self.publish(topic, data),
            Command::Join { topic } => {
                let topic = gossipsub::IdentTopic::new(topic);
                if let Err(error) = self.swarm.behaviour_mut().gossip.subscribe(&topic) {
                    warn!(%topic, %error, "not subscribed");
                }
            }
            Command::Leave { topic } => {
                let topic = gossipsub::IdentTopic::new(topic);
                self.swarm.behaviour_mut().gossip.unsubscribe(&topic);
            }
            Command::Tell { topic, data } => {
                let hash = gossipsub::IdentTopic::new(&topic).hash();
                // Whoever subscribes later is told anew.
                let _was_sent = try_publish(&mut self.swarm, hash, &data);
            }
            Command::Judge { id, forwarder, sound } => {
                let verdict = if sound {
                    gossipsub::MessageAcceptance::Accept
                } else {
                    gossipsub::MessageAcceptance::Reject
                };
                // False only if the message has left gossipsub's cache in the meantime.
                let _known = self.swarm.behaviour_mut().gossip.report_message_validation_result(
                    &id,
                    &convert::id(forwarder),
                    verdict,
                );
            }
            Command::Dial { peer, addresses } => self.dial_peer(peer, addresses),
            Command::TellTwins { peer } => {
                let behaviour = self.swarm.behaviour();
                tokio::spawn(tell_twins(behaviour.streams.new_control(), convert::id(peer)));
            }
            Command::Disconnect { peer } => {
                // An error means that it is not connected, which is the goal.
                let _ = self.swarm.disconnect_peer_id(convert::id(peer));
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

    /// Dials a peer, best addresses first, unless it is connected or being dialled.
    fn dial_peer(&mut self, peer: PeerId, addresses: Vec<Address>) {
        if self.swarm.is_connected(&convert::id(peer)) {
            return;
        }
        let addresses = addresses.into_iter().take(PEER_ADDRESSES_MAX).collect();
        let first = self.dials.begin(Instant::now(), peer, addresses);
        self.dial_wave(peer, first, PeerCondition::DisconnectedAndNotDialing);
    }

    fn dial_wave(&mut self, peer: PeerId, addresses: Vec<Address>, condition: PeerCondition) {
        if addresses.is_empty() {
            return;
        }
        let reuses = self.reuses_port(&addresses[0]);
        let dial = DialOpts::peer_id(convert::id(peer))
            .condition(condition)
            .addresses(convert::multiaddrs(addresses));
        let dial = if reuses { dial.build() } else { dial.allocate_new_port().build() };
        if let Some(error) = self.dial(dial) {
            self.on_dial_error(Some(peer), &error);
        }
    }

    /// Whether an address is dialled from this node's listening port. Others then see how a NAT
    /// maps that port, which is where a hole is punched. TCP dials from a new port each time:
    /// if two nodes dialled each other at once from their listening ports, both would act as
    /// the dialler.
    fn reuses_port(&self, address: &Address) -> bool {
        // A socket on loopback cannot dial other machines.
        address.transport() == Transport::Quic
            && (self.listens_beyond_loopback || address.is_loopback())
    }

    /// Begins a dial; why not, if it cannot even begin.
    fn dial(&mut self, dial: impl Into<DialOpts>) -> Option<DialError> {
        match self.swarm.dial(dial) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => None,
            Err(error) => {
                debug!(%error, "dial refused");
                Some(error)
            }
        }
    }

    /// Dials an address of whoever answers there.
    fn dial_address(&mut self, now: Instant, address: &Address) {
        let reuses = self.reuses_port(address);
        let Some(multiaddr) = convert::multiaddr(address) else { return };
        let dial = DialOpts::unknown_peer_id().address(multiaddr);
        let dial = if reuses { dial.build() } else { dial.allocate_new_port().build() };
        if let Some(error) = self.dial(dial) {
            self.redial.failed(now, address, &root_of(&error));
        }
    }

    fn on_tick(&mut self, now: Instant) {
        let swarm = &self.swarm;
        let due = self.redial.due(now, |peer| swarm.is_connected(&convert::id(peer)));
        let mut by_peer: BTreeMap<PeerId, Vec<Address>> = BTreeMap::new();
        for address in due {
            match address.peer() {
                Some(peer) => by_peer.entry(peer).or_default().push(address),
                None => self.dial_address(now, &address),
            }
        }
        for (peer, addresses) in by_peer {
            self.dial_peer(peer, addresses);
        }
        self.review_bootstrap(now);
        self.look_for_twins(now);
        for (peer, addresses) in self.dials.due(now) {
            self.dial_wave(peer, addresses, PeerCondition::Disconnected);
        }
        for id in self.paths.superseded(now) {
            self.swarm.close_connection(id);
        }
        self.nat.tick(&mut self.swarm, now, &self.peers);
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

    /// Tells the caller of identities that two nodes use, this node's own or a peer's.
    fn look_for_twins(&mut self, now: Instant) {
        for (end, address) in self.selves.twins(now) {
            if end == End::Dialled {
                self.redial.failed(now, &address, "another node of this node's identity answers");
            }
            self.notice(Notice::Twin { address });
        }
        if self.runs_at <= now {
            self.runs_at = now + RUNS_EVERY;
            for (peer, places) in self.runs.doubled(now) {
                self.notice(Notice::Doubled { peer, places });
            }
        }
    }

    /// Says which bootstrap addresses do not lead into the swarm, and why.
    fn review_bootstrap(&mut self, now: Instant) {
        let (peers, topics) = (&self.peers, &self.topics);
        // Before it has identified itself a peer had no time to say what it takes part in.
        let met = |peer: PeerId| {
            peers.get(&peer).map(|peer| Met {
                since: peer.connected_at,
                is_member: topics.iter().any(|topic| peer.topics.contains(topic))
                    || peer.agent.is_none(),
            })
        };
        for (address, problem) in self.redial.review(now, met) {
            warn!("bootstrap address {address}: {problem}");
        }
        let report = self.redial.report();
        self.outputs.bootstrap.send_if_modified(|known| {
            let news = *known != report;
            *known = report;
            news
        });
    }

    /// Logs why a peer was refused, and bans it for a while if it has no valid key.
    fn on_refusal(&mut self, refusal: Refusal) {
        let now = Instant::now();
        let Refusal { peer, remote, why } = &refusal;
        let remote = remote.as_ref().map_or_else(String::new, |address| format!(" at {address}"));
        let is_news = !self.bans.contains_key(peer)
            && self.warned_at.is_none_or(|at| now - at >= REFUSAL_LOG_EVERY);
        if is_news {
            self.warned_at = Some(now);
            warn!("no connection with {peer}{remote}: {why}");
        } else {
            debug!("no connection with {peer}{remote}: {why}");
        }
        self.redial.failed_peer(now, *peer, &why.to_string());
        let (peer, reason) = (*peer, why.to_string());
        self.notice(Notice::NotReached { peer, reason, is_stranger: true });
        if why.is_proof_of_guilt() {
            self.ban(peer, now + KEY_BAN);
        }
        // The caller only counts refusals, so dropping one is harmless.
        let _ = self.outputs.refusals.try_send(refusal);
    }

    fn ban(&mut self, peer: PeerId, until: Instant) {
        if self.bans.len() >= BANS_MAX && !self.bans.contains_key(&peer) {
            let first = self.bans.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer);
            if let Some(first) = first {
                self.unban(first);
            }
        }
        self.bans.insert(peer, until);
        self.swarm.behaviour_mut().bans.block_peer(convert::id(peer));
    }

    fn unban(&mut self, peer: PeerId) {
        self.bans.remove(&peer);
        self.swarm.behaviour_mut().bans.unblock_peer(convert::id(peer));
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connected(convert::peer(peer_id), connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed {
                peer_id, connection_id, num_established, cause, ..
            } => {
                let peer = convert::peer(peer_id);
                self.reused.remove(&connection_id);
                self.paths.closed(peer, connection_id);
                self.runs.closed(peer, connection_id);
                self.pings_lost.remove(&connection_id);
                debug!(%peer, ?cause, others = num_established, "a connection closed");
                if num_established == 0 {
                    self.peers.remove(&peer);
                    self.outputs.activities.forget(peer);
                } else {
                    self.update_path(peer);
                }
                self.publish_peers();
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                debug!(?peer_id, %error, "dial failed");
                self.on_dial_error(peer_id.map(convert::peer), &error);
                if let Some(peer) = peer_id.map(convert::peer) {
                    let next = self.dials.failed(Instant::now(), peer);
                    self.dial_wave(peer, next, PeerCondition::Disconnected);
                }
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.nat.on_listening(&mut self.swarm, &address);
                self.look_around();
                self.publish_listening();
            }
            SwarmEvent::ExpiredListenAddr { .. } => {
                self.look_around();
                self.publish_listening();
            }
            SwarmEvent::IncomingConnectionError {
                error: ListenError::LocalPeerId { address },
                ..
            } => self.on_self(End::Accepted, &address),
            SwarmEvent::ExternalAddrConfirmed { .. } | SwarmEvent::ExternalAddrExpired { .. } => {
                self.publish_listening()
            }
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                if !self.nat.on_listener_closed(listener_id) {
                    warn!(?addresses, ?reason, "a listener closed");
                }
                self.publish_listening();
            }
            SwarmEvent::ListenerError { error, .. } => debug!(%error, "listener"),
            _ => {}
        }
    }

    fn on_connected(&mut self, peer: PeerId, id: ConnectionId, point: &ConnectedPoint) {
        let now = Instant::now();
        let remote = convert::address_or_peer(point.get_remote_address(), peer);
        // A direct dial that succeeds beside a relayed connection went through a punched hole.
        let punched = self.peers.get(&peer).is_some_and(|peer| !peer.path.is_direct());
        self.dials.forget(peer);
        self.paths.opened(now, peer, id, point);
        let entry = self.peers.entry(peer).or_insert_with(|| Peer {
            remote: remote.without_peer(),
            path: Path::Direct,
            dialled: None,
            offers_relay: false,
            listens: Vec::new(),
            agent: None,
            connected_at: now,
            topics: BTreeSet::new(),
        });
        if point.is_dialer() {
            if !punched || point.is_relayed() {
                entry.dialled = Some(remote.without_peer());
            }
            self.redial.connected(&remote, peer);
        }
        if self.reuses_port(&remote)
            && matches!(
                point,
                ConnectedPoint::Dialer {
                    port_use: PortUse::Reuse,
                    role_override: Endpoint::Dialer,
                    ..
                }
            )
        {
            self.reused.insert(id);
        }
        self.update_path(peer);
        self.publish_peers();
    }

    /// Updates the path and address by which a peer is reached.
    fn update_path(&mut self, peer: PeerId) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let Some((remote, path)) = self.paths.best(peer) else { return };
        if entry.path != path {
            debug!(%peer, ?path, "the path to a peer changed");
        }
        entry.remote.clone_from(remote);
        entry.path = path;
    }

    /// A connection's other end showed this node's own identity: this node itself, whose address
    /// is not dialled again, or another one.
    fn on_self(&mut self, end: End, address: &Multiaddr) {
        let Some(address) = convert::address(address) else { return };
        if let Some(own) = self.selves.note(Instant::now(), end, address) {
            self.redial.forget_self(&own);
        }
    }

    /// Keeps the reason with the bootstrap addresses that it concerns, and tells the caller.
    fn on_dial_error(&mut self, peer: Option<PeerId>, error: &DialError) {
        let now = Instant::now();
        let mut told = None;
        match error {
            DialError::LocalPeerId { address } => self.on_self(End::Dialled, address),
            DialError::WrongPeerId { obtained, address } => {
                if let Some(address) = convert::address(address) {
                    let reason = format!("another node answers there: {obtained}");
                    self.redial.failed(now, &address, &reason);
                    told = Some(format!("{}: {reason}", address.without_peer()));
                }
            }
            DialError::Transport(errors) => {
                for (address, error) in errors {
                    if let Some(address) = convert::address(address) {
                        let reason = root_of(error);
                        self.redial.failed(now, &address, &reason);
                        told = Some(format!("{}: {reason}", address.without_peer()));
                    }
                }
            }
            DialError::DialPeerConditionFalse(_) => {}
            DialError::NoAddresses | DialError::Aborted | DialError::Denied { .. } => {
                if let Some(peer) = peer {
                    self.redial.failed_peer(now, peer, &root_of(error));
                    told = Some(root_of(error));
                }
            }
        }
        if let Some((peer, reason)) = peer.zip(told) {
            self.notice(Notice::NotReached { peer, reason, is_stranger: false });
        }
    }

    /// Tells the caller, unless it has much to read already.
    fn notice(&self, notice: Notice) {
        // What is dropped happens again.
        let _ = self.outputs.notices.try_send(notice);
    }

    /// Another address of this machine is another network: what could not be reached may be now.
    fn look_around(&mut self) {
        let here = self.swarm.listeners().filter_map(convert::address);
        let here = here.filter(|address| address.transport() != Transport::Relay);
        let here: BTreeSet<IpAddr> = here.filter_map(|address| address.ip()).collect();
        if !here.is_subset(&self.here) {
            self.redial.hurry(Instant::now());
        }
        self.here = here;
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => self.on_message(convert::peer(propagation_source), message_id, message),
            BehaviourEvent::Gossip(gossipsub::Event::Subscribed { peer_id, topic, .. }) => {
                if let Some(peer) = self.peers.get_mut(&convert::peer(peer_id)) {
                    peer.topics.insert(topic.into_string());
                    self.publish_peers();
                }
                // Someone has subscribed, so queued publications can go out at once.
                self.on_tick(Instant::now());
            }
            BehaviourEvent::Gossip(gossipsub::Event::Unsubscribed { peer_id, topic, .. }) => {
                if let Some(peer) = self.peers.get_mut(&convert::peer(peer_id)) {
                    peer.topics.remove(topic.as_str());
                    self.publish_peers();
                }
            }
            BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                connection_id,
                info,
            }) => {
                if self.reused.contains(&connection_id)
                    && convert::address(&info.observed_addr)
                        .is_some_and(|address| address.transport() == Transport::Quic)
                    && let Some(autonat) = self.swarm.behaviour_mut().autonat.as_mut()
                {
                    autonat.seen(info.observed_addr.clone());
                }
                self.on_identified(convert::peer(peer_id), connection_id, info);
            }
            BehaviourEvent::Autonat(event) => self.nat.on_autonat(&mut self.swarm, event),
            BehaviourEvent::RelayClient(event) => self.nat.on_relay(event),
            BehaviourEvent::RelayServer(event) => debug!(?event, "as a relay"),
            BehaviourEvent::Dcutr(event) => match event.result {
                Ok(_) => info!(peer = %event.remote_peer_id, "reached directly, through its NAT"),
                Err(error) => {
                    info!(peer = %event.remote_peer_id, %error, "stays on its relay");
                }
            },
            // A client without the ping protocol, such as a page, does not count as silent.
            BehaviourEvent::Ping(ping::Event {
                result: Err(ping::Failure::Unsupported), ..
            }) => {}
            BehaviourEvent::Ping(event) => self.on_ping(event),
            BehaviourEvent::Mdns(mdns::Event::Discovered(found))
            | BehaviourEvent::Mdns6(mdns::Event::Discovered(found)) => {
                let mut by_peer: BTreeMap<PeerId, Vec<Address>> = BTreeMap::new();
                for (peer, address) in found {
                    let addresses = by_peer.entry(convert::peer(peer)).or_default();
                    addresses.extend(convert::address(&address));
                }
                for (peer, mut addresses) in by_peer {
                    addresses.truncate(PEER_ADDRESSES_MAX);
                    self.notice(Notice::Found { peer, addresses });
                }
            }
            _ => {}
        }
    }

    fn on_message(
        &mut self,
        forwarder: PeerId,
        id: gossipsub::MessageId,
        message: gossipsub::Message,
    ) {
        // Strict validation has already refused messages without an author.
        let Some(author) = message.source.map(convert::peer) else { return };
        // What came over a connection proves more than an answer that is late.
        self.outputs.activities.of(forwarder).gossiped();
        if self.peers.contains_key(&author) {
            self.outputs.activities.of(author).heard();
        }
        let topic = message.topic.into_string();
        let message = Message { topic, author, forwarder, data: message.data, id };
        if self.outputs.messages.try_send(message).is_err() {
            self.outputs.drops.messages.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Closes the connection to a silent peer. One that is alive is not silent: its answer waits
    /// behind other bytes. Of two connections the other one may be the one that moves.
    fn on_ping(&mut self, event: ping::Event) {
        let Err(error) = event.result else {
            self.pings_lost.remove(&event.connection);
            return;
        };
        let peer = convert::peer(event.peer);
        let activity = self.outputs.activities.of(peer);
        let lost = self.pings_lost.entry(event.connection).or_insert(0);
        *lost += 1;
        if activity.is_alive(*lost) && self.paths.is_only(peer) {
            debug!(%peer, %error, "a late answer of a peer that is alive");
            return;
        }
        debug!(%peer, %error, lost = *lost, "silent peer; closing its connection");
        self.swarm.close_connection(event.connection);
    }

    fn on_identified(&mut self, peer: PeerId, id: ConnectionId, info: identify::Info) {
        if info.protocol_version != self.protocol_version {
            info!(%peer, theirs = %sanitised(&info.protocol_version, AGENT_BYTES_MAX), "has another protocol version; disconnecting");
            let now = Instant::now();
            let theirs = sanitised(&info.protocol_version, AGENT_BYTES_MAX);
            let reason = format!("it speaks another protocol, {theirs:?}");
            self.redial.failed_peer(now, peer, &reason);
            self.notice(Notice::NotReached { peer, reason, is_stranger: true });
            self.ban(peer, now + FOREIGN_BAN);
            return;
        }
        let (agent, run) = split_run(&info.agent_version);
        if let Some((run, remote)) = run.zip(self.paths.remote(peer, id)) {
            self.runs.identified(Instant::now(), peer, id, run, remote.clone());
        }
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.agent = Some(sanitised(agent, AGENT_BYTES_MAX));
            entry.offers_relay = info.protocols.contains(&libp2p::relay::HOP_PROTOCOL_NAME);
            let listens = info.listen_addrs.iter().filter_map(convert::address);
            entry.listens = listens.take(PEER_ADDRESSES_MAX).collect();
            self.publish_peers();
        }
    }

    fn publish_peers(&self) {
        self.outputs.peers.send_replace(Arc::new(self.peers.clone()));
    }

    fn publish_listening(&self) {
        let own = convert::peer(*self.swarm.local_peer_id());
        let addresses: BTreeSet<Address> = self
            .swarm
            .listeners()
            .chain(self.swarm.external_addresses())
            .filter_map(convert::address)
            .map(|address| address.with_peer(own))
            .collect();
        self.outputs.listening.send_replace(addresses.into_iter().collect());
        self.nat.set_wanted_ports(&self.swarm);
    }
}

/// Listens at every address.
fn listen(swarm: &mut Swarm<Behaviour>, addresses: &[Address]) -> Result<(), SwarmError> {
    // All of them first: a port of one family looks taken once this node has the other's.
    addresses.iter().try_for_each(refuse_taken_port)?;
    for address in addresses {
        let refuse = |reason| SwarmError::Listen { address: address.clone(), reason };
        let multiaddr = convert::multiaddr(address);
        let multiaddr = multiaddr.ok_or_else(|| refuse("libp2p does not know it".into()))?;
        swarm.listen_on(multiaddr).map_err(|error| refuse(root_of(&error)))?;
    }
    Ok(())
}

/// Checks that a TCP port is free. libp2p listens with SO_REUSEPORT, so a second node on the
/// same port would silently take every other connection; a plain bind detects that.
fn refuse_taken_port(address: &Address) -> Result<(), SwarmError> {
    let Some(socket) = address.tcp_socket() else { return Ok(()) };
    if socket.port() == 0 {
        return Ok(());
    }
    std::net::TcpListener::bind(socket)
        .map(drop)
        .map_err(|error| SwarmError::Listen { address: address.clone(), reason: error.to_string() })
}

/// Tries to publish. False if it is worth trying again later.
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

fn build(
    options: &Options,
    refusals: mpsc::Sender<Refusal>,
    activities: &Activities,
) -> Result<Swarm<Behaviour>, SwarmError> {
    let keys = keypair(options.seed);
    let (transport, circuits) = crate::transport::build(&keys, options, refusals, activities)?;
    let behaviour = Behaviour::new(&keys, options, circuits)?;
    let config = libp2p::swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE_CONNECTION)
        .with_max_negotiating_inbound_streams(NEGOTIATING_STREAMS_MAX);
    let own = keys.public().to_peer_id();
    let mut swarm = Swarm::new(transport, behaviour, own, config);
    if options.external.len() > EXTERNAL_MAX {
        warn!("only the first {EXTERNAL_MAX} external addresses are announced");
    }
    for address in options.external.iter().take(EXTERNAL_MAX) {
        if let Some(address) = convert::multiaddr(&address.without_peer()) {
            swarm.add_external_address(address);
        }
    }
    Ok(swarm)
}

/// The innermost cause of an error: what the layers above it add are their own names.
fn root_of(error: &dyn std::error::Error) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    sanitised(&root.to_string(), REASON_BYTES_MAX)
}

/// A peer's text, truncated to a bounded length and without control characters.
fn sanitised(text: &str, bytes_max: usize) -> String {
    let mut out = String::new();
    for character in text.chars().filter(|c| !c.is_control()) {
        if out.len() + character.len_utf8() > bytes_max {
            break;
        }
        out.push(character);
    }
    out
}
