//! How the loop handles NATs: it learns from peers whether this node can be dialled, offers a
//! relay or reserves slots at other relays, and reports how this node is reached.
//!
//! Invariant: an address that was announced because of a peer or a router is withdrawn once
//! they no longer confirm it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use libp2p::autonat::{Event as AutoNatEvent, NatStatus, OutboundProbeEvent};
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::relay::client::Event as RelayEvent;
use libp2p::{Multiaddr, Swarm, relay};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, info};

use crate::behaviour::Behaviour;
use crate::handle::Peer;
use crate::options::{CONFIRMED_MAX, MAPPED_PORTS_MAX, Options, UNMAP_TIMEOUT};
use crate::reach::{Reach, Reachability};
use crate::relay::{RelayAction, RelayMode, Reservations};
use crate::upnp::{self, Mapped, Port};
use crate::{Address, PeerId, Transport, convert};

/// A task that keeps ports mapped at the router.
struct Mapper {
    wanted: watch::Sender<BTreeSet<Port>>,
    mapped: watch::Receiver<Mapped>,
    task: JoinHandle<()>,
}

impl Mapper {
    fn start() -> Self {
        let (wanted, want) = watch::channel(BTreeSet::new());
        let (out, mapped) = watch::channel(Mapped::default());
        Self { wanted, mapped, task: tokio::spawn(upnp::keep(want, out)) }
    }
}

pub(crate) struct Nat {
    mode: RelayMode,
    /// `None` if UPnP is off or the node listens on loopback only.
    mapper: Option<Mapper>,
    /// Addresses announced on the user's request, which are never withdrawn.
    external: BTreeSet<Address>,
    /// Addresses announced because a peer reached this node there.
    confirmed: BTreeSet<Multiaddr>,
    reservations: Reservations,
    /// The listeners of the reservations.
    listeners: HashMap<ListenerId, PeerId>,
    reach: Reach,
    out: watch::Sender<Reach>,
}

impl Nat {
    pub(crate) fn new(options: &Options, out: watch::Sender<Reach>) -> Self {
        let wide = options.listen.iter().any(|address| !address.is_loopback());
        Self {
            mode: options.relay,
            mapper: (options.upnp && wide).then(Mapper::start),
            external: options.external.iter().map(Address::without_peer).collect(),
            confirmed: BTreeSet::new(),
            reservations: Reservations::default(),
            listeners: HashMap::new(),
            reach: Reach::default(),
            out,
        }
    }

    pub(crate) fn on_autonat(&mut self, swarm: &mut Swarm<Behaviour>, event: AutoNatEvent) {
        match event {
            AutoNatEvent::OutboundProbe(OutboundProbeEvent::Response { address, .. }) => {
                // Kept exactly as announced, so that it can be withdrawn. The user's addresses lack
                // the peer id, so they cannot be withdrawn by mistake.
                if self.confirmed.len() < CONFIRMED_MAX {
                    self.confirmed.insert(address);
                }
            }
            AutoNatEvent::StatusChanged { new, .. } => {
                self.reach.reachability = match new {
                    NatStatus::Public(_) => Reachability::Public,
                    NatStatus::Private => Reachability::Private,
                    NatStatus::Unknown => Reachability::Unknown,
                };
                info!(reachability = ?self.reach.reachability, "peers report whether they can dial this node");
                if self.reach.reachability == Reachability::Private {
                    for address in std::mem::take(&mut self.confirmed) {
                        swarm.remove_external_address(&address);
                    }
                }
                self.offer(swarm);
            }
            other => debug!(?other, "AutoNAT"),
        }
        self.publish();
    }

    fn is_external(&self, address: &Address) -> bool {
        self.external.contains(&address.without_peer())
    }

    /// Sets the ports to map, after the listen addresses have changed. No router is asked
    /// before there is a port behind one.
    pub(crate) fn set_wanted_ports(&self, swarm: &Swarm<Behaviour>) {
        if let Some(mapper) = &self.mapper {
            let listens = swarm.listeners().filter_map(convert::address);
            let ports = listens.filter_map(|address| Port::of(&address));
            let ports: BTreeSet<Port> = ports.take(MAPPED_PORTS_MAX).collect();
            mapper.wanted.send_if_modified(|known| {
                let news = *known != ports;
                *known = ports;
                news
            });
        }
    }

    /// Waits until the router's mappings change, and returns them.
    pub(crate) async fn mapping(&mut self) -> Mapped {
        if let Some(mapper) = &mut self.mapper
            && mapper.mapped.changed().await.is_ok()
        {
            return mapper.mapped.borrow_and_update().clone();
        }
        std::future::pending().await
    }

    /// Announces the addresses that the router forwards to this node, and withdraws those that it
    /// no longer forwards.
    pub(crate) fn on_mapping(&mut self, swarm: &mut Swarm<Behaviour>, mapped: &Mapped) {
        let mut now = BTreeSet::new();
        if let Some(ip) = mapped.external_ip {
            let listens = swarm.listeners().filter_map(convert::address);
            let forwarded =
                listens.filter(|at| Port::of(at).is_some_and(|port| mapped.ports.contains(&port)));
            now.extend(forwarded.filter_map(|address| address.at(ip)));
        }
        for address in std::mem::take(&mut self.reach.mapped) {
            if !now.contains(&address)
                && !self.is_external(&address)
                && let Some(address) = convert::multiaddr(&address)
            {
                swarm.remove_external_address(&address);
            }
        }
        for address in &now {
            info!(%address, "the router forwards a port to this node");
            if let Some(address) = convert::multiaddr(address) {
                swarm.add_external_address(address);
            }
        }
        self.reach.mapped = now.into_iter().collect();
        self.publish();
    }

    /// Removes the port mappings from the router.
    pub(crate) async fn unmap(&mut self) {
        if let Some(Mapper { wanted, task, .. }) = self.mapper.take() {
            drop(wanted);
            // Without an answer in time, the mappings expire by themselves.
            let _ = tokio::time::timeout(UNMAP_TIMEOUT, task).await;
        }
    }

    pub(crate) fn on_relay(&mut self, event: RelayEvent) {
        match event {
            RelayEvent::ReservationReqAccepted { relay_peer_id, renewal, .. } => {
                debug!(relay = %relay_peer_id, renewal, "has a reservation at a relay");
                self.reservations.granted(Instant::now(), convert::peer(relay_peer_id));
                self.publish();
            }
            other => debug!(?other, "relay"),
        }
    }

    /// A listener has an address. In server mode the user vouches for it, so it is announced.
    pub(crate) fn on_listening(&self, swarm: &mut Swarm<Behaviour>, address: &Multiaddr) {
        let transport = convert::address(address).map(|address| address.transport());
        if self.mode == RelayMode::Server
            && transport.is_some_and(|transport| transport < Transport::WebRtc)
        {
            swarm.add_external_address(address.clone());
        }
    }

    /// True if the listener belonged to a reservation at a relay.
    pub(crate) fn on_listener_closed(&mut self, id: ListenerId) -> bool {
        let Some(relay) = self.listeners.remove(&id) else { return false };
        debug!(%relay, "lost its reservation at this relay");
        self.reservations.lost(Instant::now(), relay);
        self.publish();
        true
    }

    /// Requests or releases reservations. `peers` are the connected ones.
    pub(crate) fn tick(
        &mut self,
        swarm: &mut Swarm<Behaviour>,
        now: Instant,
        peers: &BTreeMap<PeerId, Peer>,
    ) {
        let wanted = match self.mode {
            RelayMode::Off | RelayMode::Server => false,
            RelayMode::Client => self.reach.reachability != Reachability::Public,
            RelayMode::Auto => self.reach.reachability == Reachability::Private,
        };
        let offering = peers.iter().filter(|(_, peer)| peer.offers_relay && peer.path.is_direct());
        let offering = offering.filter(|(_, peer)| address_of(peer).is_some());
        for action in self.reservations.plan(now, wanted, offering.map(|(id, _)| *id)) {
            match action {
                RelayAction::Reserve(relay) => self.ask(swarm, now, relay, &peers[&relay]),
                RelayAction::Release(relay) => {
                    let left = self.listeners.iter().find(|(_, peer)| **peer == relay);
                    if let Some(id) = left.map(|(id, _)| *id) {
                        swarm.remove_listener(id);
                    }
                }
            }
        }
    }

    fn ask(&mut self, swarm: &mut Swarm<Behaviour>, now: Instant, relay: PeerId, peer: &Peer) {
        let address = address_of(peer).map(|address| address.with_peer(relay));
        let address = address.and_then(|address| convert::multiaddr(&address));
        let listening = address.map(|address| swarm.listen_on(address.with(Protocol::P2pCircuit)));
        match listening {
            Some(Ok(id)) => {
                self.listeners.insert(id, relay);
            }
            Some(Err(error)) => {
                debug!(%relay, %error, "cannot request a reservation");
                self.reservations.lost(now, relay);
            }
            None => self.reservations.lost(now, relay),
        }
    }

    /// Updates whether others may use this node as a relay.
    pub(crate) fn offer(&mut self, swarm: &mut Swarm<Behaviour>) {
        self.reach.offers_relay = match self.mode {
            RelayMode::Off | RelayMode::Client => false,
            RelayMode::Server => true,
            RelayMode::Auto => self.reach.reachability == Reachability::Public,
        };
        let status =
            if self.reach.offers_relay { relay::Status::Enable } else { relay::Status::Disable };
        if let Some(server) = swarm.behaviour_mut().relay_server.as_mut() {
            server.set_status(Some(status));
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.reach.relays = self.reservations.relays();
        let reach = &self.reach;
        self.out.send_if_modified(|out| {
            let news = out != reach;
            if news {
                out.clone_from(reach);
            }
            news
        });
    }
}

/// The address at which others reach a relay. Preferred in this order: a global address that it
/// listens on, the address that this node dialled, an address that it listens on with the IP address
/// it is connected from.
fn address_of(relay: &Peer) -> Option<Address> {
    let dialable = |address: &&Address| address.transport() < Transport::WebRtc;
    let listens = || relay.listens.iter().filter(dialable);
    let best = |of: &mut dyn Iterator<Item = &Address>| {
        of.min_by_key(|address| address.transport()).cloned()
    };
    let here = relay.remote.ip();
    best(&mut listens().filter(|address| address.is_global()))
        .or_else(|| relay.dialled.iter().find(dialable).cloned())
        .or_else(|| best(&mut listens().filter(|address| here.is_some() && address.ip() == here)))
}
