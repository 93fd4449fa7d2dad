//! Where peers were reached before, kept in the data directory between runs.
//!
//! Owns `peers.json`, but does not trust it: its addresses are only dialled, and a peer must prove
//! its id (and a private swarm's key) as usual. Invariant: the file is bounded and written as a
//! whole. A damaged file costs a warning and the known addresses, never the start.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::identity::write_private;
use doppler_mesh::{Address, PeerId};
use doppler_store::regular;

/// The most peers kept. The one not met for longest is dropped.
const PEERS_MAX: usize = 64;
/// Addresses kept of each.
const ADDRESSES_MAX: usize = 4;
/// The longest file that is read, far above what is ever written.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// Peers and the addresses at which they answered, most recently met first.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressBook {
    peers: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    id: String,
    addresses: Vec<String>,
}

pub fn file(data: &Path) -> PathBuf {
    data.join("peers.json")
}

impl AddressBook {
    /// Reads the book. An absent file counts as empty; so does a damaged one, with a warning.
    pub fn load(path: &Path) -> Self {
        match read(path) {
            Ok(book) => book,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => {
                tracing::warn!("{}: {error}; known addresses are forgotten", path.display());
                Self::default()
            }
        }
    }

    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_private(path, &serde_json::to_vec_pretty(self)?)
    }

    /// Notes where a peer was reached. True if that changed something worth saving.
    pub fn note(&mut self, peer: PeerId, addresses: &[Address]) -> bool {
        let id = peer.to_string();
        let mut addresses: Vec<String> =
            addresses.iter().map(|address| address.without_peer().to_string()).collect();
        addresses.truncate(ADDRESSES_MAX);
        let known = self.peers.iter().position(|entry| entry.id == id);
        if addresses.is_empty() || known.is_some_and(|at| self.peers[at].addresses == addresses) {
            return false;
        }
        if let Some(at) = known {
            self.peers.remove(at);
        }
        self.peers.insert(0, Entry { id, addresses });
        self.peers.truncate(PEERS_MAX);
        true
    }

    /// Every address with its peer's id. Entries that do not parse are left out.
    pub fn addresses(&self) -> Vec<Address> {
        let entries = self.peers.iter().take(PEERS_MAX);
        let each = entries.filter_map(|entry| Some((entry.id.parse().ok()?, entry)));
        each.flat_map(|(peer, entry): (PeerId, &Entry)| {
            let addresses = entry.addresses.iter().take(ADDRESSES_MAX);
            addresses.filter_map(move |text| Some(text.parse::<Address>().ok()?.with_peer(peer)))
        })
        .collect()
    }
}

fn read(path: &Path) -> std::io::Result<AddressBook> {
    let mut bytes = Vec::new();
    regular::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("more than {FILE_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(&bytes).map_err(|error| std::io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::from_seed([number; 32])
    }

    fn address(port: usize) -> Address {
        format!("/ip4/10.0.0.1/tcp/{port}").parse().unwrap()
    }

    #[test]
    fn the_last_met_are_kept_within_bounds() {
        let mut book = AddressBook::default();
        let many: Vec<Address> = (1..10).map(address).collect();
        for number in 0..=PEERS_MAX as u8 {
            assert!(book.note(peer(number), &many));
        }
        assert!(!book.note(peer(3), &many), "nothing new");
        assert!(book.note(peer(3), &[address(99)]));
        assert!(!book.note(peer(3), &[]), "nothing to remember");
        let known = book.addresses();
        assert_eq!(known.len(), (PEERS_MAX - 1) * ADDRESSES_MAX + 1);
        assert_eq!(known[0], address(99).with_peer(peer(3)));
        assert!(
            known.iter().all(|address| address.peer() != Some(peer(0))),
            "the first was dropped"
        );

        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        assert_eq!(AddressBook::load(&path), AddressBook::default());
        book.save(&path).unwrap();
        assert_eq!(AddressBook::load(&path), book);
        assert!(std::fs::metadata(&path).unwrap().len() < FILE_BYTES_MAX);
    }

    #[test]
    fn a_damaged_file_is_an_empty_book() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        let mut book = AddressBook::default();
        book.note(peer(1), &[address(1)]);
        book.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for damaged in [
            whole[..whole.len() / 2].to_vec(),
            vec![0xff; 100],
            Vec::new(),
            b"[]".to_vec(),
            vec![b' '; FILE_BYTES_MAX as usize + 1],
        ] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(AddressBook::load(&path), AddressBook::default());
        }
        let strange = r#"{"peers":[{"id":"me","addresses":["/ip4/1.1.1.1/tcp/1"]},
            {"id":"ID","addresses":["nowhere","/ip4/1.1.1.1/tcp/2"]}]}"#;
        std::fs::write(&path, strange.replace("ID", &peer(1).to_string())).unwrap();
        let known = AddressBook::load(&path).addresses();
        let expected: Address = "/ip4/1.1.1.1/tcp/2".parse().unwrap();
        assert_eq!(known, [expected.with_peer(peer(1))]);
    }
}
