//! A node's identity: the multihash of its public key, as libp2p writes it.
//!
//! Source of the format: <https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md>.
//! Accepts what libp2p accepts, so that converting between the two never fails.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::SigningKey;

/// The longest peer id in bytes.
pub const PEER_BYTES_MAX: usize = 66;
/// The longest text of a peer id: 66 bytes in base 58.
const PEER_TEXT_MAX: usize = 92;

/// Multihash codes, and the longest digest of each.
const IDENTITY: (u8, usize) = (0x00, 42);
const SHA2_256: (u8, usize) = (0x12, 64);

/// The prefix of an Ed25519 key in protobuf form: type (field 1) Ed25519, data (field 2), 32 bytes.
const ED25519_PREFIX: [u8; 4] = [0x08, 0x01, 0x12, 0x20];

/// A node's identity: the hash of its public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId {
    /// The multihash, padded with zeros.
    bytes: [u8; PEER_BYTES_MAX],
    len: u8,
}

/// Text or bytes that are not a peer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a peer id (like 12D3KooW...)")]
pub struct BadPeerId(pub String);

impl PeerId {
    /// The id of the node whose Ed25519 secret key is `seed`.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self::from_public_key(SigningKey::from_bytes(&seed).verifying_key().to_bytes())
    }

    /// The id of the node with this Ed25519 public key. Does not check the key.
    pub fn from_public_key(key: [u8; 32]) -> Self {
        let mut bytes = [0; PEER_BYTES_MAX];
        let len = 2 + ED25519_PREFIX.len() + key.len();
        bytes[0] = IDENTITY.0;
        bytes[1] = len as u8 - 2;
        bytes[2..6].copy_from_slice(&ED25519_PREFIX);
        bytes[6..len].copy_from_slice(&key);
        Self { bytes, len: len as u8 }
    }

    /// The multihash bytes, at most [`PEER_BYTES_MAX`] of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// A copy of [`Self::as_bytes`].
    pub fn to_bytes(self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    /// The inverse of [`Self::to_bytes`].
    ///
    /// # Errors
    /// If the bytes are not the multihash of a public key.
    pub fn from_bytes(multihash: &[u8]) -> Result<Self, BadPeerId> {
        let bad = || BadPeerId(format!("{} bytes", multihash.len()));
        let [code, size, digest @ ..] = multihash else { return Err(bad()) };
        let known = [IDENTITY, SHA2_256].into_iter().find(|(known, _)| known == code);
        let (_, digest_max) = known.ok_or_else(bad)?;
        if usize::from(*size) != digest.len() || digest.len() > digest_max {
            return Err(bad());
        }
        let mut bytes = [0; PEER_BYTES_MAX];
        bytes[..multihash.len()].copy_from_slice(multihash);
        Ok(Self { bytes, len: multihash.len() as u8 })
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&bs58::encode(self.as_bytes()).into_string())
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
        let bad = || BadPeerId(text.chars().take(PEER_TEXT_MAX).collect());
        // Decoding time grows with the square of the length.
        if text.len() > PEER_TEXT_MAX {
            return Err(bad());
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| bad())?;
        Self::from_bytes(&bytes).map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_bytes_and_follow_from_the_seed() {
        let peer = PeerId::from_seed([7; 32]);
        assert_eq!(peer, PeerId::from_seed([7; 32]));
        assert_ne!(peer, PeerId::from_seed([8; 32]));
        assert_eq!(peer.to_string().parse(), Ok(peer));
        assert!(peer.to_string().starts_with("12D3KooW"), "{peer}");
        assert_eq!(PeerId::from_bytes(&peer.to_bytes()), Ok(peer));
        let rsa = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC";
        assert_eq!(rsa.parse::<PeerId>().map(|peer| peer.to_string()), Ok(rsa.to_owned()));
    }

    #[test]
    fn what_is_no_multihash_of_a_key_is_refused() {
        for bytes in [
            &b""[..],
            b"no",
            &[0x12],
            &[0x12, 32, 1, 2],
            &[0x11, 2, 1, 2],
            &[&[0x00, 43][..], &[1; 43]].concat(),
            &[&[0x12, 65][..], &[1; 65]].concat(),
            &[0x00, 1, 1, 1],
        ] {
            assert!(PeerId::from_bytes(bytes).is_err(), "{bytes:?}");
        }
        assert!(PeerId::from_bytes(&[&[0x12, 64][..], &[1; 64]].concat()).is_ok());
        for text in ["", "no", "0OIl", &"1".repeat(10_000), "12D3KooW\u{e4}"] {
            assert!(text.parse::<PeerId>().is_err(), "{text}");
        }
        // Not a different id with the same first bytes.
        let (a, b) = (PeerId::from_bytes(&[0, 1, 0]), PeerId::from_bytes(&[0, 0]));
        assert_ne!(a.unwrap(), b.unwrap());
    }
}
