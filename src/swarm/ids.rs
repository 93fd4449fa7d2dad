//! Peer ids and addresses as plain values, so that callers never name libp2p.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

/// A node's identity: the hash of its public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(crate) libp2p::PeerId);

/// Text or bytes that are not a peer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a peer id (like 12D3KooW...)")]
pub struct BadPeerId(pub String);

impl PeerId {
    /// The id of the node whose Ed25519 secret key is `seed`.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(keypair(seed).public().to_peer_id())
    }

    /// The multihash bytes, at most 66 of them.
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.to_bytes()
    }

    /// The inverse of [`Self::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadPeerId> {
        libp2p::PeerId::from_bytes(bytes)
            .map(Self)
            .map_err(|_| BadPeerId(format!("{} bytes", bytes.len())))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

impl FromStr for PeerId {
    type Err = BadPeerId;
    fn from_str(text: &str) -> Result<Self, BadPeerId> {
        text.parse().map(Self).map_err(|_| BadPeerId(text.to_owned()))
    }
}

/// Expands a 32-byte seed into the Ed25519 key pair of a node.
pub(crate) fn keypair(mut seed: [u8; 32]) -> libp2p::identity::Keypair {
    // Any 32 bytes are a valid Ed25519 secret key, so this cannot fail.
    libp2p::identity::Keypair::ed25519_from_bytes(&mut seed).expect("32 bytes are a secret key")
}

/// Where a node can be reached, in multiaddr form: `/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub(crate) Multiaddr);

/// What carries a connection. In the order in which nodes prefer them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Carrier {
    Quic,
    Tcp,
    /// Plain or over TLS; a browser's way in.
    WebSocket,
    /// WebRTC-direct; a browser's other way in. Nodes never dial it.
    WebRtc,
    /// Through another peer.
    Relay,
    Other,
}

impl Carrier {
    /// Whether a page can dial it.
    pub const fn suits_browsers(self) -> bool {
        matches!(self, Self::WebSocket | Self::WebRtc)
    }
}

/// Text that is not a multiaddr.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a multiaddr such as /ip4/127.0.0.1/tcp/4001: {reason}")]
pub struct BadAddress {
    pub text: String,
    pub reason: String,
}

impl Address {
    /// The peer named by a trailing `/p2p/...`, if any.
    pub fn peer(&self) -> Option<PeerId> {
        match self.0.iter().last() {
            Some(Protocol::P2p(peer)) => Some(PeerId(peer)),
            _ => None,
        }
    }

    /// What carries a connection to this address.
    pub fn carrier(&self) -> Carrier {
        let mut carrier = Carrier::Other;
        for part in self.0.iter() {
            carrier = match part {
                Protocol::P2pCircuit => return Carrier::Relay,
                Protocol::Tcp(_) => Carrier::Tcp,
                Protocol::QuicV1 => Carrier::Quic,
                Protocol::Ws(_) | Protocol::Wss(_) => Carrier::WebSocket,
                Protocol::WebRTCDirect => Carrier::WebRtc,
                _ => carrier,
            };
        }
        carrier
    }

    /// The IP address that it begins with, if any.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.0.iter().next()? {
            Protocol::Ip4(ip) => Some(ip.into()),
            Protocol::Ip6(ip) => Some(ip.into()),
            _ => None,
        }
    }

    /// The relay that a `/p2p-circuit` address goes through, if it is one and names it.
    pub fn relay(&self) -> Option<PeerId> {
        let mut relay = None;
        for part in self.0.iter() {
            match part {
                Protocol::P2p(peer) => relay = Some(PeerId(peer)),
                Protocol::P2pCircuit => return relay,
                _ => {}
            }
        }
        None
    }

    /// Whether it begins with an IP address that the whole internet could reach. Names
    /// and what lies behind a relay do not count.
    pub fn is_global(&self) -> bool {
        self.carrier() != Carrier::Relay
            && match self.ip() {
                Some(IpAddr::V4(ip)) => Self::is_global_v4(ip),
                // Global unicast: 2000::/3, less what is set aside for examples.
                Some(IpAddr::V6(ip)) => {
                    let [first, second, ..] = ip.segments();
                    first & 0xe000 == 0x2000 && (first, second) != (0x2001, 0xdb8)
                }
                None => false,
            }
    }

    /// The special blocks of RFC 6890 left out.
    pub(crate) fn is_global_v4(ip: Ipv4Addr) -> bool {
        let [a, b, c, _] = ip.octets();
        let shared = a == 100 && b & 0xc0 == 64;
        let protocols = (a, b, c) == (192, 0, 0);
        let benchmarks = a == 198 && b & 0xfe == 18;
        let set_aside = shared || protocols || benchmarks || a == 0 || a >= 224;
        let local = ip.is_private() || ip.is_loopback() || ip.is_link_local();
        !(set_aside || local || ip.is_documentation())
    }

    /// Whether only this machine can reach it.
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_loopback())
    }

    /// Whether it is UDP, and the socket, of an address that begins with `/ip4/.../udp|tcp/...`.
    pub(crate) fn ipv4_socket(&self) -> Option<(bool, SocketAddrV4)> {
        let mut parts = self.0.iter();
        let Protocol::Ip4(ip) = parts.next()? else { return None };
        match parts.next()? {
            Protocol::Udp(port) => Some((true, SocketAddrV4::new(ip, port))),
            Protocol::Tcp(port) => Some((false, SocketAddrV4::new(ip, port))),
            _ => None,
        }
    }

    /// The same address on another machine, if it begins with `/ip4/...`.
    pub(crate) fn at(&self, ip: Ipv4Addr) -> Option<Self> {
        self.0
            .replace(0, |part| matches!(part, Protocol::Ip4(_)).then_some(Protocol::Ip4(ip)))
            .map(Self)
    }

    /// The socket of an address that begins with `/ip4|ip6/.../tcp/...`.
    pub(crate) fn tcp_socket(&self) -> Option<SocketAddr> {
        let ip = self.ip()?;
        match self.0.iter().nth(1)? {
            Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
            _ => None,
        }
    }

    /// The same address ending in `/p2p/PEER`.
    #[must_use]
    pub fn with_peer(&self, peer: PeerId) -> Self {
        let mut bare = self.without_peer().0;
        bare.push(Protocol::P2p(peer.0));
        Self(bare)
    }

    /// The same address without a trailing `/p2p/...`.
    #[must_use]
    pub fn without_peer(&self) -> Self {
        let mut address = self.0.clone();
        if self.peer().is_some() {
            address.pop();
        }
        Self(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

impl FromStr for Address {
    type Err = BadAddress;
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        text.parse()
            .map(Self)
            .map_err(|error| BadAddress { text: text.to_owned(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_whether_the_world_or_a_relay_leads_there() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        for text in
            ["/ip4/5.5.5.5/tcp/1", "/ip6/2606:4700::1/udp/1/quic-v1", "/ip4/1.1.1.1/tcp/1/ws"]
        {
            assert!(address(text).is_global(), "{text}");
        }
        for text in [
            "/ip4/10.1.1.1/tcp/1",
            "/ip4/100.64.0.1/tcp/1",
            "/ip4/198.51.100.1/tcp/1",
            "/ip4/0.0.0.0/tcp/1",
            "/ip4/224.0.0.1/udp/1",
            "/ip6/fd00::1/tcp/1",
            "/ip6/2001:db8::1/tcp/1",
            "/dns4/example.org/tcp/1",
        ] {
            assert!(!address(text).is_global(), "{text}");
        }
        let (relay, peer) = (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]));
        let circuit = address(&format!("/ip4/5.5.5.5/tcp/1/p2p/{relay}/p2p-circuit/p2p/{peer}"));
        assert_eq!((circuit.relay(), circuit.peer()), (Some(relay), Some(peer)));
        assert!(!circuit.is_global());
        assert_eq!(address(&format!("/ip4/5.5.5.5/tcp/1/p2p/{peer}")).relay(), None);
        let inside = address("/ip4/10.0.0.2/udp/7/quic-v1");
        let outside = inside.at(Ipv4Addr::new(5, 5, 5, 5)).unwrap();
        assert_eq!(outside.to_string(), "/ip4/5.5.5.5/udp/7/quic-v1");
        assert!(address("/dns4/a/tcp/1").at(Ipv4Addr::LOCALHOST).is_none());
    }

    #[test]
    fn ids_survive_text_and_bytes_and_follow_from_the_seed() {
        let peer = PeerId::from_seed([7; 32]);
        assert_eq!(peer, PeerId::from_seed([7; 32]));
        assert_ne!(peer, PeerId::from_seed([8; 32]));
        assert_eq!(peer.to_string().parse(), Ok(peer));
        assert_eq!(PeerId::from_bytes(&peer.to_bytes()), Ok(peer));
        assert!(PeerId::from_bytes(b"no").is_err());
        assert!("no".parse::<PeerId>().is_err());
    }

    #[test]
    fn addresses_gain_and_lose_their_peer() {
        let peer = PeerId::from_seed([1; 32]);
        let bare: Address = "/ip4/127.0.0.1/tcp/4001".parse().unwrap();
        let full = bare.with_peer(peer);
        assert_eq!((bare.peer(), full.peer()), (None, Some(peer)));
        assert_eq!(full.without_peer(), bare);
        assert_eq!(full.with_peer(peer), full);
        assert!("127.0.0.1:4001".parse::<Address>().is_err());
    }

    #[test]
    fn an_address_says_what_carries_it() {
        let relay = format!("/ip4/1.2.3.4/tcp/1/p2p/{}/p2p-circuit", PeerId::from_seed([1; 32]));
        for (text, carrier) in [
            ("/ip4/1.2.3.4/tcp/1", Carrier::Tcp),
            ("/ip4/1.2.3.4/tcp/1/ws", Carrier::WebSocket),
            ("/dns4/node.example/tcp/443/wss", Carrier::WebSocket),
            ("/dns4/node.example/tcp/443/tls/ws", Carrier::WebSocket),
            ("/ip6/::1/udp/1/quic-v1", Carrier::Quic),
            ("/ip4/1.2.3.4/udp/1/webrtc-direct", Carrier::WebRtc),
            ("/ip4/1.2.3.4/udp/1", Carrier::Other),
            (&relay, Carrier::Relay),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().carrier(), carrier, "{text}");
        }
        assert!(Carrier::Quic < Carrier::Tcp && Carrier::Tcp < Carrier::WebSocket);
    }
}
