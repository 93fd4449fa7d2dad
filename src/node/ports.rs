//! The ports on which a node listened last, kept in its data directory, so that an address that
//! others saved stays valid after a restart.
//!
//! Owns `listen.json`. Does not take a port that somebody else has by now. Invariant: the last port
//! is requested only if the system chose it. A damaged file costs the ports, never the start.

use std::collections::BTreeSet;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::identity::write_private;
use doppler_mesh::{Address, Transport};
use doppler_store::regular;

/// The most addresses whose ports are kept; more than anybody listens on.
const ADDRESSES_MAX: usize = 64;

/// The last port of each address that leaves its port to the system.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    last: Vec<Last>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Last {
    /// As it was configured, with port 0.
    listen: String,
    port: u16,
}

pub fn file(data: &Path) -> PathBuf {
    data.join("listen.json")
}

impl Ports {
    /// Reads the file. An absent or damaged one contains no ports.
    pub fn load(path: &Path) -> Self {
        let bytes = regular::read(path).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_private(path, &serde_json::to_vec_pretty(self)?)
    }

    /// The same addresses, but those that leave their port to the system get the last one, if it is
    /// free. Two equal addresses take one port each.
    pub fn apply(&self, listen: &[Address]) -> Vec<Address> {
        let mut last: Vec<&Last> = self.last.iter().collect();
        let again = |address: &Address| {
            let text = address.to_string();
            let at = last.iter().position(|last| last.listen == text)?;
            let known = address.with_port(last.remove(at).port);
            (address.port() == Some(0) && is_free(&known)).then_some(known)
        };
        let mut again = again;
        listen.iter().map(|address| again(address).unwrap_or_else(|| address.clone())).collect()
    }

    /// Notes the ports on which the addresses listen. True if that changed something worth saving.
    pub fn note(&mut self, listen: &[Address], listening: &[Address]) -> bool {
        let mut taken = BTreeSet::new();
        let mut last = Vec::new();
        for address in listen.iter().filter(|address| address.port() == Some(0)) {
            let fits = |one: &&Address| {
                let key = (one.transport(), one.port());
                one.transport() == address.transport()
                    && is_on(one, address)
                    && !taken.contains(&key)
            };
            let Some(found) = listening.iter().find(fits) else { continue };
            taken.insert((found.transport(), found.port()));
            if let Some(port) = found.port() {
                last.push(Last { listen: address.to_string(), port });
            }
        }
        last.truncate(ADDRESSES_MAX);
        let is_news = !last.is_empty() && last != self.last;
        if is_news {
            self.last = last;
        }
        is_news
    }
}

/// Whether a listening address belongs to a configured one: it has the same IP address, or one of
/// the same family if the configured one is unspecified.
fn is_on(listening: &Address, listen: &Address) -> bool {
    listening.transport() != Transport::Relay
        && match (listening.ip(), listen.ip()) {
            (Some(one), Some(other)) => {
                one == other || other.is_unspecified() && one.is_ipv4() == other.is_ipv4()
            }
            _ => false,
        }
}

/// Whether nobody listens there. Checked just before this node does.
fn is_free(address: &Address) -> bool {
    match (address.tcp_socket(), address.udp_socket()) {
        (Some(socket), _) => TcpListener::bind(socket).is_ok(),
        (None, Some(socket)) => UdpSocket::bind(socket).is_ok(),
        (None, None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Address> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn each_address_gets_its_own_port_again() {
        let listen = addresses(&[
            "/ip4/0.0.0.0/udp/0/quic-v1",
            "/ip4/0.0.0.0/tcp/0",
            "/ip4/0.0.0.0/tcp/0/ws",
            "/ip4/127.0.0.1/tcp/0",
            "/ip4/127.0.0.1/tcp/4001",
            "/ip6/::/tcp/0",
        ]);
        let peer = doppler_mesh::PeerId::from_seed([1; 32]);
        let listening = addresses(&[
            "/ip4/127.0.0.1/tcp/1001",
            "/ip4/127.0.0.1/tcp/1002",
            "/ip4/127.0.0.1/tcp/1003/ws",
            "/ip4/10.0.0.1/tcp/1001",
            "/ip4/10.0.0.1/udp/1004/quic-v1",
        ]);
        let listening: Vec<Address> = listening.iter().map(|one| one.with_peer(peer)).collect();
        let mut ports = Ports::default();
        assert!(ports.note(&listen, &listening));
        assert!(!ports.note(&listen, &listening), "nothing new");
        let known: Vec<(&str, u16)> =
            ports.last.iter().map(|last| (last.listen.as_str(), last.port)).collect();
        let expected = [
            ("/ip4/0.0.0.0/udp/0/quic-v1", 1004),
            ("/ip4/0.0.0.0/tcp/0", 1001),
            ("/ip4/0.0.0.0/tcp/0/ws", 1003),
            ("/ip4/127.0.0.1/tcp/0", 1002),
        ];
        assert_eq!(known, expected, "a port that was given is not remembered");
        assert!(!ports.note(&listen, &[]), "what did not listen this time is not forgotten");
    }

    #[test]
    fn the_last_port_is_taken_again_only_while_it_is_free() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (tcp, udp) = (socket.local_addr().unwrap(), datagrams.local_addr().unwrap());
        let listen = addresses(&["/ip4/127.0.0.1/tcp/0/ws", "/ip4/127.0.0.1/udp/0/quic-v1"]);
        let there = [listen[0].with_port(tcp.port()), listen[1].with_port(udp.port())];
        let mut ports = Ports::default();
        assert!(ports.note(&listen, &there));
        assert_eq!(ports.apply(&listen), listen, "both are taken");
        drop((socket, datagrams));
        assert_eq!(ports.apply(&listen), there);
        let named = addresses(&["/ip4/127.0.0.1/tcp/4001/ws"]);
        assert_eq!(ports.apply(&named), named, "a port that is named is meant");

        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        assert_eq!(Ports::load(&path), Ports::default());
        ports.save(&path).unwrap();
        assert_eq!(Ports::load(&path), ports);
        std::fs::write(&path, "{\"last\": 3").unwrap();
        assert_eq!(Ports::load(&path), Ports::default());
    }
}
