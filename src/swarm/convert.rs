//! Conversions between libp2p's peer ids and multiaddrs and this project's own.
//!
//! Invariant: a peer id converts both ways without loss. An address converts if all of its
//! protocols could lead to a node; other addresses, which only a peer could name, are dropped.

use doppler_ids::{Address, PeerId};
use libp2p::Multiaddr;
use libp2p::identity::Keypair;

/// Expands a 32-byte seed into the Ed25519 key pair of a node.
pub(crate) fn keypair(mut seed: [u8; 32]) -> Keypair {
    // Any 32 bytes are a valid Ed25519 secret key, so this cannot fail.
    Keypair::ed25519_from_bytes(&mut seed).expect("32 bytes are a secret key")
}

pub(crate) fn peer(id: libp2p::PeerId) -> PeerId {
    PeerId::from_bytes(&id.to_bytes()).expect("both accept the same multihashes")
}

pub(crate) fn id(peer: PeerId) -> libp2p::PeerId {
    libp2p::PeerId::from_bytes(peer.as_bytes()).expect("both accept the same multihashes")
}

/// `None` if the address has a protocol that cannot lead to a node.
pub(crate) fn address(multiaddr: &Multiaddr) -> Option<Address> {
    Address::from_bytes(multiaddr.as_ref()).ok()
}

/// The address of a connection's other end, or only the peer if that address does not convert.
pub(crate) fn address_or_peer(multiaddr: &Multiaddr, peer: PeerId) -> Address {
    address(multiaddr).unwrap_or_else(|| Address::of_peer(peer))
}

/// `None` if libp2p does not accept the address, which does not happen.
pub(crate) fn multiaddr(address: &Address) -> Option<Multiaddr> {
    Multiaddr::try_from(address.as_bytes().to_vec()).ok()
}

pub(crate) fn multiaddrs(addresses: impl IntoIterator<Item = Address>) -> Vec<Multiaddr> {
    addresses.into_iter().filter_map(|address| multiaddr(&address)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_libp2ps_in_bytes_and_text() {
        for seed in 0..50u8 {
            let theirs = keypair([seed; 32]).public().to_peer_id();
            let ours = PeerId::from_seed([seed; 32]);
            assert_eq!((peer(theirs), id(ours)), (ours, theirs));
            assert_eq!(ours.to_string(), theirs.to_string());
            assert_eq!(theirs.to_string().parse(), Ok(ours));
        }
        // Both accept the same lengths.
        for code in [0x00, 0x11, 0x12, 0x13, 0x80] {
            for len in 0..70u8 {
                let bytes = [&[code, len][..], &vec![7; usize::from(len)]].concat();
                let theirs = libp2p::PeerId::from_bytes(&bytes).ok();
                let ours = PeerId::from_bytes(&bytes).ok();
                assert_eq!(theirs.map(peer), ours, "{code} {len}");
                assert_eq!(ours.map(id), theirs);
                let longer = [&bytes[..], &[1]].concat();
                assert!(PeerId::from_bytes(&longer).is_err());
                assert!(libp2p::PeerId::from_bytes(&longer).is_err());
            }
        }
    }

    #[test]
    fn addresses_are_libp2ps_in_bytes_and_text() {
        let node = PeerId::from_seed([1; 32]);
        let hash = "uEiDDq4_xNyDorZBH3TlGazyJdOWSwvo4PUo5YHFMrvDE8g";
        let texts = [
            "/ip4/1.2.3.4/tcp/0".to_owned(),
            "/ip6/2001:db8::7:0:9/udp/65535/quic-v1".into(),
            "/ip6/::ffff:1.2.3.4/tcp/1".into(),
            "/ip6zone/eth0/ip6/fe80::1/tcp/1/noise".into(),
            "/dns/a.example/udp/1/quic".into(),
            "/dns4/node.example/tcp/443/tls/sni/node.example/ws".into(),
            "/dns6/n\u{e4}he.example/tcp/443/wss".into(),
            "/dnsaddr/example.org/http".into(),
            "/ip4/1.2.3.4/tcp/443/https".into(),
            "/ip4/1.2.3.4/tcp/1/x-parity-ws/%2Fa%20b%25%3F".into(),
            "/ip4/1.2.3.4/tcp/1/x-parity-wss/path".into(),
            "/ip4/1.2.3.4/tcp/1/x-parity-wss/%2F".into(),
            format!("/ip4/1.2.3.4/udp/9/webrtc-direct/certhash/{hash}/p2p/{node}"),
            format!("/ip4/1.2.3.4/udp/9/quic-v1/webtransport/certhash/{hash}"),
            format!("/ip4/1.2.3.4/udp/9/quic-v1/p2p/{node}/p2p-circuit/webrtc/p2p/{node}"),
            format!("/p2p/{node}"),
            "/memory/1234567890123".into(),
        ];
        for text in texts {
            let theirs: Multiaddr = text.parse().unwrap();
            let ours: Address = text.parse().unwrap();
            assert_eq!(ours.to_string(), theirs.to_string());
            assert_eq!(address(&theirs), Some(ours.clone()));
            assert_eq!(multiaddr(&ours), Some(theirs));
        }
        for text in ["/onion/aaimaq4ygg2iegci:80", "/ip4/1.2.3.4/udt", "/unix/a"] {
            let theirs: Multiaddr = text.parse().unwrap();
            assert_eq!(address(&theirs), None, "{text}");
            assert_eq!(address_or_peer(&theirs, node), Address::of_peer(node));
        }
        assert_eq!(address(&Multiaddr::empty()), None);
    }

    #[test]
    fn orders_are_libp2ps() {
        let texts = ["/ip4/1.2.3.4/udp/9", "/ip4/1.2.3.4/tcp/9", "/ip6/::1/tcp/1", "/dns4/a/tcp/1"];
        let mut ours: Vec<Address> = texts.iter().map(|text| text.parse().unwrap()).collect();
        let mut theirs: Vec<Multiaddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(multiaddrs(ours), theirs);
    }
}
