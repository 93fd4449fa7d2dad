//! The connections to each peer, direct and relayed. Pure: the time is an argument.
//!
//! Invariant: a peer counts as relayed only while it has no direct connection, and its
//! relayed connections are closed `grace` after its first direct one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::core::ConnectedPoint;
use libp2p::swarm::ConnectionId;

use crate::{Address, PeerId, convert};

/// How this node and a peer are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    Direct,
    /// Only through relays. `by` is the relay of the oldest connection, if known.
    Relayed {
        by: Option<PeerId>,
    },
}

impl Path {
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::Direct)
    }
}

/// One connection.
struct Link {
    path: Path,
    since: Instant,
    remote: Address,
}

/// Every peer's connections.
pub(crate) struct Paths {
    peers: BTreeMap<PeerId, BTreeMap<ConnectionId, Link>>,
    grace: Duration,
}

impl Paths {
    pub(crate) const fn new(grace: Duration) -> Self {
        Self { peers: BTreeMap::new(), grace }
    }

    pub(crate) fn opened(
        &mut self,
        now: Instant,
        peer: PeerId,
        id: ConnectionId,
        point: &ConnectedPoint,
    ) {
        let link = Link { path: path_of(point), since: now, remote: remote_of(peer, point) };
        self.peers.entry(peer).or_default().insert(id, link);
    }

    pub(crate) fn closed(&mut self, peer: PeerId, id: ConnectionId) {
        if let Some(links) = self.peers.get_mut(&peer) {
            links.remove(&id);
            if links.is_empty() {
                self.peers.remove(&peer);
            }
        }
    }

    /// Where the other end of a connection is.
    pub(crate) fn remote(&self, peer: PeerId, id: ConnectionId) -> Option<&Address> {
        Some(&self.peers.get(&peer)?.get(&id)?.remote)
    }

    /// Whether a peer has no other connection than one.
    pub(crate) fn is_only(&self, peer: PeerId) -> bool {
        self.peers.get(&peer).is_none_or(|links| links.len() == 1)
    }

    /// The address and path of a peer's oldest direct connection; of its oldest one if none is
    /// direct.
    pub(crate) fn best(&self, peer: PeerId) -> Option<(&Address, Path)> {
        let links = self.peers.get(&peer)?.values();
        let best = links.min_by_key(|link| (!link.path.is_direct(), link.since))?;
        Some((&best.remote, best.path))
    }

    /// Relayed connections to close, because their peers have had a direct one for `grace`.
    pub(crate) fn superseded(&self, now: Instant) -> Vec<ConnectionId> {
        let mut superseded = Vec::new();
        for links in self.peers.values() {
            let direct = links.values().filter(|link| link.path.is_direct()).map(|link| link.since);
            if direct.min().is_some_and(|since| since + self.grace <= now) {
                let relayed = links.iter().filter(|(_, link)| !link.path.is_direct());
                superseded.extend(relayed.map(|(id, _)| *id));
            }
        }
        superseded
    }
}

/// The path of a connection.
fn path_of(point: &ConnectedPoint) -> Path {
    let (ConnectedPoint::Dialer { address, .. }
    | ConnectedPoint::Listener { local_addr: address, .. }) = point;
    if point.is_relayed() {
        Path::Relayed { by: convert::address(address).and_then(|address| address.relay()) }
    } else {
        Path::Direct
    }
}

/// Where the other end is. Of who came through a relay only that is known.
fn remote_of(peer: PeerId, point: &ConnectedPoint) -> Address {
    match point {
        ConnectedPoint::Listener { local_addr, .. } if point.is_relayed() => {
            convert::address_or_peer(local_addr, peer).up_to_circuit()
        }
        _ => convert::address_or_peer(point.get_remote_address(), peer).without_peer(),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::core::Endpoint;
    use libp2p::core::transport::PortUse;

    use super::*;

    const GRACE: Duration = Duration::from_secs(1);

    fn dialled(address: &str) -> ConnectedPoint {
        ConnectedPoint::Dialer {
            address: address.parse().unwrap(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        }
    }

    #[test]
    fn a_direct_connection_is_preferred_and_the_relayed_one_is_closed_after_a_while() {
        let start = Instant::now();
        let (peer, relay) = (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]));
        let circuit = format!("/ip4/10.0.0.2/udp/1/quic-v1/p2p/{relay}/p2p-circuit");
        let came = ConnectedPoint::Listener {
            local_addr: format!("{circuit}/p2p/{}", PeerId::from_seed([3; 32])).parse().unwrap(),
            send_back_addr: format!("/p2p/{peer}").parse().unwrap(),
        };
        let ids = [0, 1, 2].map(ConnectionId::new_unchecked);
        let mut paths = Paths::new(GRACE);
        assert!(paths.best(peer).is_none());
        paths.opened(start, peer, ids[0], &came);
        let (remote, by) = paths.best(peer).unwrap();
        assert_eq!((remote.to_string(), by), (circuit.clone(), Path::Relayed { by: Some(relay) }));
        assert!(paths.superseded(start + GRACE * 99).is_empty(), "the only connection");

        let went = dialled(&format!("{circuit}/p2p/{peer}"));
        assert_eq!(path_of(&went), Path::Relayed { by: Some(relay) });
        paths.opened(start, peer, ids[1], &went);
        let later = start + GRACE * 5;
        paths.opened(later, peer, ids[2], &dialled("/ip4/10.0.0.9/udp/7/quic-v1"));
        let (remote, path) = paths.best(peer).unwrap();
        assert_eq!(
            (remote.to_string().as_str(), path),
            ("/ip4/10.0.0.9/udp/7/quic-v1", Path::Direct)
        );
        assert!(paths.superseded(later).is_empty());
        assert_eq!(paths.superseded(later + GRACE), ids[..2]);
        paths.closed(peer, ids[2]);
        assert!(!paths.best(peer).unwrap().1.is_direct(), "back on the relay");
        for id in ids {
            paths.closed(peer, id);
        }
        assert!(paths.best(peer).is_none());
    }
}
