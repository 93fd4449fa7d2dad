//! Streams that know whether they are relayed. libp2p's stream behaviour would pick any
//! connection, so there are two of them: one for direct connections and one for relayed ones.
//!
//! Invariant: a stream of one of them never uses a connection of the other.

use std::task::{Context, Poll};

use either::Either;
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

/// Streams over direct connections only, or over relayed ones only.
pub(crate) struct PathStreams {
    inner: libp2p_stream::Behaviour,
    relayed: bool,
}

impl PathStreams {
    /// Over relayed connections if `relayed`, otherwise over direct ones.
    pub(crate) fn new(relayed: bool) -> Self {
        Self { inner: libp2p_stream::Behaviour::new(), relayed }
    }

    pub(crate) fn new_control(&self) -> libp2p_stream::Control {
        self.inner.new_control()
    }

    fn wants(&self, address: &Multiaddr) -> bool {
        address.iter().any(|part| part == Protocol::P2pCircuit) == self.relayed
    }
}

impl NetworkBehaviour for PathStreams {
    type ConnectionHandler = Either<THandler<libp2p_stream::Behaviour>, dummy::ConnectionHandler>;
    type ToSwarm = ();

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if !self.wants(local) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner.handle_established_inbound_connection(id, peer, local, remote).map(Either::Left)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if !self.wants(address) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner
            .handle_established_outbound_connection(id, peer, address, role, port_use)
            .map(Either::Left)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { endpoint, .. })
            | FromSwarm::ConnectionClosed(ConnectionClosed { endpoint, .. })
                if endpoint.is_relayed() != self.relayed => {}
            event => self.inner.on_swarm_event(event),
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {
            Either::Left(event) => self.inner.on_connection_handler_event(peer, id, event),
            Either::Right(never) => match never {},
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(cx).map(|action| action.map_in(Either::Left))
    }
}
