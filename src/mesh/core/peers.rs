//! Tables by peer that are looked up with every message of a large swarm.
//!
//! A peer id is 67 bytes, so that each comparison in an ordered map is a cache line; a hash finds an entry
//! with two. Invariant: nothing that is decided depends on the order of such a table's entries. Whoever
//! goes through one sorts, counts, or breaks ties by the peer.
//!
//! The hash has no secret. Whoever makes ids that collide slows down a table whose size is bounded.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use doppler_ids::PeerId;

pub(super) type PeerMap<V> = HashMap<PeerId, V, BuildHasherDefault<PeerHasher>>;

/// By [`digest`]: for what is only counted of very many peers. Such a table is a quarter as large.
pub(super) type DigestMap<V> = HashMap<u64, V, BuildHasherDefault<PeerHasher>>;

/// Stands for a peer where little depends on it: two peers of one digest are counted as one. Whoever wants the
/// digest of another's id has to make 2^64 keys.
pub(super) fn digest(peer: PeerId) -> u64 {
    let mut hasher = PeerHasher::default();
    hasher.write(peer.as_bytes());
    hasher.finish()
}

/// Folds the bytes of a key, which is itself a hash or a public key.
#[derive(Default)]
pub(super) struct PeerHasher(u64);

/// Odd, with bits all over: 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl PeerHasher {
    const fn fold(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(FACTOR);
    }
}

impl Hasher for PeerHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        words.iter().for_each(|word| self.fold(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.fold(u64::from_le_bytes(word));
        }
    }

    fn finish(&self) -> u64 {
        // The low bits choose the place, the high ones are compared first.
        (self.0 ^ self.0 >> 32).wrapping_mul(FACTOR)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::hash::{BuildHasher, BuildHasherDefault};

    use super::*;

    #[test]
    fn different_peers_have_different_places() {
        let build = BuildHasherDefault::<PeerHasher>::default();
        let hashes = (0..2000u32).map(|number| {
            let mut key = [7; 32];
            key[28..].copy_from_slice(&number.to_be_bytes());
            build.hash_one(PeerId::from_public_key(key))
        });
        let hashes: Vec<u64> = hashes.collect();
        assert_eq!(hashes.iter().collect::<BTreeSet<_>>().len(), 2000);
        for shift in [0, 53] {
            let places: BTreeSet<u64> = hashes.iter().map(|hash| hash >> shift & 2047).collect();
            // At random 63 of 100 places are taken.
            assert!(places.len() > 1150, "{} places of 2048", places.len());
        }
    }
}
