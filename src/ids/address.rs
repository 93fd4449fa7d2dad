//! Where a node can be reached: a multiaddr as a value, without libp2p.
//!
//! Stored in binary form, by which addresses are ordered and compared; parsed and printed like
//! libp2p's. Invariant: the bytes are a sequence of at least one well-formed known protocol.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;
use std::sync::Arc;

use super::multiaddr::{
    self, ADDRESS_BYTES_MAX, P2P, P2P_CIRCUIT, Part, QUIC_V1, TCP, UDP, WEBRTC_DIRECT, WS,
    WS_WITH_PATH, WSS, WSS_WITH_PATH,
};
use super::peer::PeerId;

/// Where a node can be reached, in multiaddr form: `/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(Arc<[u8]>);

/// The transport of a connection, in the order in which nodes prefer them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    Quic,
    Tcp,
    /// Plain or over TLS. Browsers can dial it.
    WebSocket,
    /// WebRTC-direct. Browsers can dial it; nodes never do.
    WebRtc,
    /// Through another peer.
    Relay,
    Other,
}

impl Transport {
    /// Whether a page can dial it.
    pub const fn suits_browsers(self) -> bool {
        matches!(self, Self::WebSocket | Self::WebRtc)
    }
}

/// Text or bytes that are not a multiaddr.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a multiaddr such as /ip4/127.0.0.1/tcp/4001: {reason}")]
pub struct BadAddress {
    pub text: String,
    pub reason: String,
}

impl Address {
    /// The address of a peer about which nothing else is known: `/p2p/PEER`.
    pub fn of_peer(peer: PeerId) -> Self {
        Self::of([], &[(P2P, peer.as_bytes())])
    }

    /// The binary form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The inverse of [`Self::as_bytes`].
    ///
    /// # Errors
    /// If the bytes are not a sequence of known protocols, or more than 1 KiB.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadAddress> {
        let bad = |reason| BadAddress { text: format!("{} bytes", bytes.len()), reason };
        if bytes.is_empty() || bytes.len() > ADDRESS_BYTES_MAX {
            return Err(bad(format!("it has 1 to {ADDRESS_BYTES_MAX} bytes")));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            (_, rest) = multiaddr::split(rest).map_err(bad)?;
        }
        Ok(Self(bytes.into()))
    }

    /// The peer named by a trailing `/p2p/...`, if any.
    pub fn peer(&self) -> Option<PeerId> {
        self.parts().last()?.peer()
    }

    /// The transport of a connection to this address.
    pub fn transport(&self) -> Transport {
        let mut transport = Transport::Other;
        for part in self.parts() {
            transport = match part.code() {
                P2P_CIRCUIT => return Transport::Relay,
                TCP => Transport::Tcp,
                QUIC_V1 => Transport::Quic,
                WS | WSS | WS_WITH_PATH | WSS_WITH_PATH => Transport::WebSocket,
                WEBRTC_DIRECT => Transport::WebRtc,
                _ => transport,
            };
        }
        transport
    }

    /// The IP address that it begins with, if any.
    pub fn ip(&self) -> Option<IpAddr> {
        let first = self.parts().next()?;
        first.ip4().map(IpAddr::V4).or_else(|| first.ip6().map(IpAddr::V6))
    }

    /// The relay of a `/p2p-circuit` address, if the address names it.
    pub fn relay(&self) -> Option<PeerId> {
        let mut relay = None;
        for part in self.parts() {
            if part.code() == P2P_CIRCUIT {
                return relay;
            }
            relay = part.peer().or(relay);
        }
        None
    }

    /// Whether it begins with a globally routable IP address. Names and relayed addresses do
    /// not count.
    pub fn is_global(&self) -> bool {
        self.transport() != Transport::Relay
            && match self.ip() {
                Some(IpAddr::V4(ip)) => Self::is_global_v4(ip),
                // Global unicast: 2000::/3 without the documentation block.
                Some(IpAddr::V6(ip)) => {
                    let [first, second, ..] = ip.segments();
                    first & 0xe000 == 0x2000 && (first, second) != (0x2001, 0xdb8)
                }
                None => false,
            }
    }

    /// Whether an address is outside the special-purpose blocks of RFC 6890.
    pub fn is_global_v4(ip: Ipv4Addr) -> bool {
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

    /// The port of the first TCP or UDP part; 0 asks the system for one.
    pub fn port(&self) -> Option<u16> {
        self.parts().find_map(|part| part.port())
    }

    /// The same address at another port, if it has one.
    #[must_use]
    pub fn with_port(&self, port: u16) -> Self {
        let mut rest = &self.0[..];
        while let Ok((part, after)) = multiaddr::split(rest) {
            if part.port().is_some() {
                let mut bytes = self.0.to_vec();
                let at = bytes.len() - after.len() - 2;
                bytes[at..at + 2].copy_from_slice(&port.to_be_bytes());
                return Self(bytes.into());
            }
            rest = after;
        }
        self.clone()
    }

    /// Whether it is UDP, and the socket, of an address that begins with `/ip4/.../udp|tcp/...`.
    pub fn ipv4_socket(&self) -> Option<(bool, SocketAddrV4)> {
        let mut parts = self.parts();
        let ip = parts.next()?.ip4()?;
        let second = parts.next()?;
        Some((second.code() == UDP, SocketAddrV4::new(ip, second.port()?)))
    }

    /// The socket of an address that begins with `/ip4|ip6/.../tcp/...`.
    pub fn tcp_socket(&self) -> Option<SocketAddr> {
        let second = self.parts().nth(1).filter(|part| part.code() == TCP)?;
        Some(SocketAddr::new(self.ip()?, second.port()?))
    }

    /// The socket of an address that begins with `/ip4|ip6/.../udp/...`.
    pub fn udp_socket(&self) -> Option<SocketAddr> {
        let second = self.parts().nth(1).filter(|part| part.code() == UDP)?;
        Some(SocketAddr::new(self.ip()?, second.port()?))
    }

    /// The same address on another machine, if it begins with `/ip4/...`.
    pub fn at(&self, ip: Ipv4Addr) -> Option<Self> {
        self.parts().next()?.ip4()?;
        let mut bytes = self.0.to_vec();
        // The code is one byte.
        bytes[1..5].copy_from_slice(&ip.octets());
        Some(Self(bytes.into()))
    }

    /// The same address ending in `/p2p/PEER`.
    #[must_use]
    pub fn with_peer(&self, peer: PeerId) -> Self {
        let bare = self.bare_len();
        Self::of(self.0[..bare].iter().copied(), &[(P2P, peer.as_bytes())])
    }

    /// The same address without a trailing `/p2p/...`. An address that is nothing else is unchanged.
    #[must_use]
    pub fn without_peer(&self) -> Self {
        match self.bare_len() {
            0 => self.clone(),
            len if len == self.0.len() => self.clone(),
            len => Self(self.0[..len].into()),
        }
    }

    /// The address up to and including `/p2p-circuit`; the whole address if it has none.
    #[must_use]
    pub fn up_to_circuit(&self) -> Self {
        let mut rest = &self.0[..];
        while let Ok((part, after)) = multiaddr::split(rest) {
            rest = after;
            if part.code() == P2P_CIRCUIT {
                break;
            }
        }
        Self(self.0[..self.0.len() - rest.len()].into())
    }

    /// Bytes before a trailing `/p2p/...`.
    fn bare_len(&self) -> usize {
        let mut rest = &self.0[..];
        while let Ok((part, after)) = multiaddr::split(rest) {
            if after.is_empty() && part.code() == P2P {
                break;
            }
            rest = after;
        }
        self.0.len() - rest.len()
    }

    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (part, after) = multiaddr::split(rest).ok()?;
            rest = after;
            Some(part)
        })
    }

    /// An address of well-formed bytes followed by further parts.
    fn of(bytes: impl IntoIterator<Item = u8>, parts: &[(u32, &[u8])]) -> Self {
        let mut bytes: Vec<u8> = bytes.into_iter().collect();
        for (code, argument) in parts {
            multiaddr::push(&mut bytes, *code, argument).expect("the argument is well formed");
        }
        Self(bytes.into())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().try_for_each(|part| part.fmt(f))
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
        let bytes = multiaddr::parse(text);
        let bytes = bytes.map_err(|reason| BadAddress { text: text.to_owned(), reason })?;
        Ok(Self(bytes.into()))
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
        for (text, transport) in [
            ("/ip4/1.2.3.4/tcp/1", Transport::Tcp),
            ("/ip4/1.2.3.4/tcp/1/ws", Transport::WebSocket),
            ("/dns4/node.example/tcp/443/wss", Transport::WebSocket),
            ("/dns4/node.example/tcp/443/tls/ws", Transport::WebSocket),
            ("/ip6/::1/udp/1/quic-v1", Transport::Quic),
            ("/ip4/1.2.3.4/udp/1/webrtc-direct", Transport::WebRtc),
            ("/ip4/1.2.3.4/udp/1", Transport::Other),
            (&relay, Transport::Relay),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().transport(), transport, "{text}");
        }
        assert!(Transport::Quic < Transport::Tcp && Transport::Tcp < Transport::WebSocket);
    }

    #[test]
    fn text_and_bytes_are_each_others_inverse() {
        let peer = PeerId::from_seed([1; 32]);
        let known = [
            "/ip4/1.2.3.4/tcp/0".to_owned(),
            "/ip6/fe80::1/udp/65535/quic-v1".into(),
            "/ip6zone/eth0/ip6/fe80::1/tcp/1".into(),
            "/dns4/node.example/tcp/443/tls/sni/node.example/ws".into(),
            "/dnsaddr/example.org/http".into(),
            "/ip4/1.2.3.4/tcp/1/x-parity-wss/%2Fa b%25".replace(' ', "%20"),
            "/ip4/1.2.3.4/udp/9/webrtc-direct/certhash/uEiDDq4_xNyDorZBH3TlGazyJdOWSwvo4PUo5YHFMrvDE8g"
                .into(),
            format!("/ip4/1.2.3.4/udp/9/quic-v1/p2p/{peer}/p2p-circuit/p2p/{peer}"),
            "/memory/1234567890123".into(),
            "/p2p-circuit".into(),
        ];
        for text in known {
            let parsed: Address = text.parse().unwrap();
            assert_eq!(parsed.to_string(), text);
            assert_eq!(Address::from_bytes(parsed.as_bytes()), Ok(parsed.clone()));
            for cut in 1..parsed.as_bytes().len() {
                // Cut at a boundary it is another address, otherwise an error. It never panics.
                let _ = Address::from_bytes(&parsed.as_bytes()[..cut]).map(|a| a.to_string());
            }
        }
        let root: Address = "/ip4/1.2.3.4/tcp/1/x-parity-ws/%2f".parse().unwrap();
        assert_eq!(root.to_string(), "/ip4/1.2.3.4/tcp/1/ws");
        let old: Address = format!("/ip4/1.2.3.4/tcp/1/ipfs/{peer}").parse().unwrap();
        assert_eq!(old.peer(), Some(peer));
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "begin"),
            ("/", "begin"),
            ("ip4/1.2.3.4", "begin"),
            ("/ip4", "ip4 needs a value"),
            ("/ip4/1.2.3", "1.2.3"),
            ("/ip4/1.2.3.4/", "not a known protocol"),
            ("/ip4/1.2.3.4/tcp/65536", "65536"),
            ("/onion/abc:1", "onion"),
            ("/dns4//tcp/1", "dns4 needs a name"),
            ("/p2p/nobody", "nobody"),
            ("/ip4/1.2.3.4/udp/1/webrtc-direct/certhash/zabc", "zabc"),
        ] {
            let refused = text.parse::<Address>().unwrap_err();
            assert!(refused.to_string().contains(reason), "{refused}");
        }
        assert!(format!("/dns4/{}", "a".repeat(2000)).parse::<Address>().is_err());
        for bytes in [&[][..], &[4, 1, 2, 3], &[54, 3, b'a', b'/', b'b'], &[54, 200, 1], &[0xff; 5]]
        {
            assert!(Address::from_bytes(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn ports_and_circuits_are_found_and_changed() {
        let quic: Address = "/ip4/0.0.0.0/udp/0/quic-v1".parse().unwrap();
        assert_eq!(quic.port(), Some(0));
        assert_eq!(quic.with_port(4001).to_string(), "/ip4/0.0.0.0/udp/4001/quic-v1");
        assert_eq!(quic.with_port(4001).udp_socket(), Some("0.0.0.0:4001".parse().unwrap()));
        assert_eq!(quic.tcp_socket(), None);
        let circuit: Address = "/p2p-circuit".parse().unwrap();
        assert_eq!((circuit.port(), circuit.with_port(1)), (None, circuit.clone()));
        let peer = PeerId::from_seed([1; 32]);
        let whole = format!("/ip4/1.2.3.4/tcp/1/p2p/{peer}/p2p-circuit");
        let to: Address = format!("{whole}/p2p/{peer}").parse().unwrap();
        assert_eq!(to.up_to_circuit().to_string(), whole);
        assert_eq!(quic.up_to_circuit(), quic);
        let alone = Address::of_peer(peer);
        assert_eq!((alone.peer(), alone.without_peer()), (Some(peer), alone.clone()));
        assert_eq!(alone.with_peer(peer), alone);
    }
}
