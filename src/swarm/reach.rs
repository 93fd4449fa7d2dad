//! Whether others can dial this node: AutoNAT with bounds, and its result.
//!
//! This is AutoNAT version 1. libp2p's version 2 never tests an address again after a
//! failure, dials any address that a peer names, and keeps every address that any peer
//! claims to have seen. Version 1 asks again, and dials an asking peer only at the IP
//! address where it sees that peer.
//!
//! Invariant: at most [`CANDIDATES_MAX`] addresses are kept that peers claim for this node.

use std::collections::{BTreeSet, VecDeque};
use std::task::{Context, Poll};

use libp2p::autonat::{Behaviour as AutoNat, Config};
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::NewExternalAddrCandidate;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

use crate::Address;
use crate::options::{
    CANDIDATES_MAX, PROBE_AGAIN, PROBE_FIRST, PROBE_PERIOD, PROBE_REFRESH, PROBE_SAME_PEER,
    PROBE_TIMEOUT, PROBED_ADDRESSES_MAX, PROBES_PER_PEER_MAX, PROBES_PER_PERIOD_MAX,
};

/// What peers found when they tried to dial this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reachability {
    /// Nobody has tried: there are no peers yet, or none outside this node's own network.
    #[default]
    Unknown,
    Public,
    /// Behind a NAT or a firewall that blocks incoming connections.
    Private,
}

/// How others reach this node, as far as it knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reach {
    pub reachability: Reachability,
    /// Addresses that a router forwards to this node on its request (UPnP).
    pub mapped: Vec<Address>,
    /// Relays at which this node has a reservation.
    pub relays: Vec<crate::PeerId>,
    /// Whether this node offers to be a relay.
    pub offers_relay: bool,
}

fn config() -> Config {
    Config {
        timeout: PROBE_TIMEOUT,
        boot_delay: PROBE_FIRST,
        refresh_interval: PROBE_REFRESH,
        retry_interval: PROBE_AGAIN,
        throttle_server_period: PROBE_SAME_PEER,
        use_connected: true,
        max_peer_addresses: PROBED_ADDRESSES_MAX,
        throttle_clients_global_max: PROBES_PER_PERIOD_MAX,
        throttle_clients_peer_max: PROBES_PER_PEER_MAX,
        throttle_clients_period: PROBE_PERIOD,
        // A peer at a private address shares a network with this node, so its result says
        // nothing about peers outside.
        only_global_ips: true,
        ..Config::default()
    }
}

/// AutoNAT with a bound on the addresses that it probes.
pub(crate) struct BoundedAutoNat {
    inner: AutoNat,
    candidates: BTreeSet<Multiaddr>,
    /// Addresses at which peers saw this node, for hole punching.
    seen: VecDeque<Multiaddr>,
}

impl BoundedAutoNat {
    pub(crate) fn new(own: PeerId) -> Self {
        let inner = AutoNat::new(own, config());
        Self { inner, candidates: BTreeSet::new(), seen: VecDeque::new() }
    }

    /// Records the address at which a peer saw a connection that this node dialled from its
    /// listening port. It shows how a NAT maps that port, which is where a hole is punched;
    /// libp2p's own guess replaces the mapped port by the listening port.
    pub(crate) fn seen(&mut self, address: Multiaddr) {
        if self.seen.len() < CANDIDATES_MAX {
            self.seen.push_back(address);
        }
    }

    /// Whether an address may be probed.
    fn admit(&mut self, address: &Multiaddr) -> bool {
        let relayed = address.iter().any(|part| part == Protocol::P2pCircuit);
        !relayed
            && (self.candidates.contains(address)
                || (self.candidates.len() < CANDIDATES_MAX
                    && self.candidates.insert(address.clone())))
    }
}

impl NetworkBehaviour for BoundedAutoNat {
    type ConnectionHandler = THandler<AutoNat>;
    type ToSwarm = libp2p::autonat::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_outbound_connection(id, peer, address, role, port_use)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr }) = event
            && !self.admit(addr)
        {
            return;
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some(address) = self.seen.pop_front() {
            return Poll::Ready(ToSwarm::NewExternalAddrCandidate(address));
        }
        self.inner.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_cannot_make_this_node_try_more_than_a_few_addresses() {
        let own = crate::convert::id(crate::PeerId::from_seed([1; 32]));
        let mut autonat = BoundedAutoNat::new(own);
        let address = |port: usize| format!("/ip4/1.1.1.1/tcp/{port}").parse().unwrap();
        let admitted = (1..99).filter(|port| autonat.admit(&address(*port))).count();
        assert_eq!(admitted, CANDIDATES_MAX);
        assert!(autonat.admit(&address(1)), "known");
        let mut autonat = BoundedAutoNat::new(own);
        let circuit = format!("/ip4/1.1.1.1/tcp/1/p2p/{own}/p2p-circuit");
        assert!(!autonat.admit(&circuit.parse().unwrap()));
        (0..99).for_each(|port| autonat.seen(address(port)));
        assert_eq!(autonat.seen.len(), CANDIDATES_MAX);
    }
}
