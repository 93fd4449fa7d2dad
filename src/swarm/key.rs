//! A private swarm's key, and how two peers prove to each other that they have it.
//! `docs/swarm-key.md` describes the bytes, so that others can implement them.
//!
//! Invariant: the key, and anything that reveals it, never goes to a peer; a proof is
//! valid for one connection and one side only.

use std::fmt;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use rand::Rng;

use crate::PeerId;

/// The protocol's name.
pub const KEY_PROTOCOL: &str = "/doppler/swarm-key/1";

/// Contexts for `blake3::derive_key`, one per side, so that neither side can be
/// answered with its own proof.
const DIALER_CONTEXT: &str = "doppler-node 2026 swarm key v1 dialer";
const LISTENER_CONTEXT: &str = "doppler-node 2026 swarm key v1 listener";
/// The context for the token of a node's own gateway.
const GATEWAY_CONTEXT: &str = "doppler-node 2026 swarm key v1 gateway";

/// How long a proof may take: a few round trips on a very slow line. Not longer,
/// because the connection counts against the limits meanwhile.
pub(crate) const KEY_TIMEOUT: Duration = Duration::from_secs(10);

const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = blake3::OUT_LEN;

/// First byte of the dialer's answer.
const HAS_NO_KEY: u8 = 0;
const HAS_KEY: u8 = 1;
/// First byte of the listener's verdict.
const REFUSED: u8 = 0;
const ACCEPTED: u8 = 1;

/// The secret of a private swarm: 32 random bytes.
#[derive(Clone)]
pub struct SwarmKey([u8; 32]);

impl SwarmKey {
    /// The length of a key.
    pub const BYTES: usize = 32;

    /// A new key from the system's randomness.
    pub fn generate() -> Self {
        let mut bytes = [0; Self::BYTES];
        rand::rng().fill_bytes(&mut bytes);
        Self(bytes)
    }

    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The token that proves the key to the HTTP gateway of one node. It is valid for nothing else:
    /// neither for another node's gateway nor for a connection.
    pub fn gateway_token(&self, node: PeerId) -> String {
        let key = blake3::derive_key(GATEWAY_CONTEXT, &self.0);
        blake3::keyed_hash(&key, &node.to_bytes()).to_hex().to_string()
    }

    fn proof(&self, side: Side, handshake: &Handshake) -> blake3::Hash {
        let context = match side {
            Side::Dialer => DIALER_CONTEXT,
            Side::Listener => LISTENER_CONTEXT,
        };
        let mut mac = blake3::Hasher::new_keyed(&blake3::derive_key(context, &self.0));
        for peer in [handshake.dialer, handshake.listener] {
            let bytes = peer.to_bytes();
            // A peer id is at most 66 bytes.
            mac.update(&[bytes.len() as u8]);
            mac.update(&bytes);
        }
        mac.update(&handshake.dialer_nonce);
        mac.update(&handshake.listener_nonce);
        mac.finalize()
    }
}

impl fmt::Debug for SwarmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SwarmKey(secret)")
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Dialer,
    Listener,
}

/// Why a peer was refused, or refused this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum KeyFailure {
    #[error("it has no swarm key, but this node has one")]
    NoKey,
    #[error("it has another swarm key")]
    WrongKey,
    #[error("it refuses this node's swarm key")]
    Refused,
    #[error("it has a swarm key, but this node has none")]
    Private,
    #[error("it broke off the proof of its swarm key")]
    Broken,
    #[error("it did not prove its swarm key in time")]
    Silent,
}

impl KeyFailure {
    /// Whether the failure proves that the peer does not have the key. The other failures may be the
    /// network's fault.
    pub const fn is_proof_of_guilt(self) -> bool {
        matches!(self, Self::NoKey | Self::WrongKey)
    }
}

/// The values that a proof is bound to.
struct Handshake {
    dialer: PeerId,
    listener: PeerId,
    dialer_nonce: [u8; NONCE_BYTES],
    listener_nonce: [u8; NONCE_BYTES],
}

/// Proves the key to the other side and checks its proof, on a stream that the listener opened.
pub(crate) async fn prove<S: AsyncRead + AsyncWrite + Unpin>(
    key: &SwarmKey,
    side: Side,
    own: PeerId,
    remote: PeerId,
    stream: &mut S,
) -> Result<(), KeyFailure> {
    let mut nonce = [0; NONCE_BYTES];
    rand::rng().fill_bytes(&mut nonce);
    match side {
        Side::Listener => listen(key, own, remote, nonce, stream).await,
        Side::Dialer => dial(key, own, remote, nonce, stream).await,
    }
}

async fn listen<S: AsyncRead + AsyncWrite + Unpin>(
    key: &SwarmKey,
    own: PeerId,
    remote: PeerId,
    listener_nonce: [u8; NONCE_BYTES],
    stream: &mut S,
) -> Result<(), KeyFailure> {
    send(stream, &[&listener_nonce]).await?;
    let [tag] = receive::<1>(stream).await?;
    if tag != HAS_KEY {
        return Err(KeyFailure::NoKey);
    }
    let dialer_nonce = receive(stream).await?;
    let theirs = blake3::Hash::from_bytes(receive::<PROOF_BYTES>(stream).await?);
    let handshake = Handshake { dialer: remote, listener: own, dialer_nonce, listener_nonce };
    // blake3 compares hashes in constant time.
    if theirs != key.proof(Side::Dialer, &handshake) {
        // The peer may be gone; that changes nothing.
        let _ = send(stream, &[&[REFUSED]]).await;
        return Err(KeyFailure::WrongKey);
    }
    let proof = key.proof(Side::Listener, &handshake);
    send(stream, &[&[ACCEPTED], proof.as_bytes()]).await
}

async fn dial<S: AsyncRead + AsyncWrite + Unpin>(
    key: &SwarmKey,
    own: PeerId,
    remote: PeerId,
    dialer_nonce: [u8; NONCE_BYTES],
    stream: &mut S,
) -> Result<(), KeyFailure> {
    let listener_nonce = receive(stream).await?;
    let handshake = Handshake { dialer: own, listener: remote, dialer_nonce, listener_nonce };
    let proof = key.proof(Side::Dialer, &handshake);
    send(stream, &[&[HAS_KEY], &dialer_nonce, proof.as_bytes()]).await?;
    let [verdict] = receive::<1>(stream).await?;
    if verdict != ACCEPTED {
        return Err(KeyFailure::Refused);
    }
    let theirs = blake3::Hash::from_bytes(receive::<PROOF_BYTES>(stream).await?);
    if theirs != key.proof(Side::Listener, &handshake) {
        return Err(KeyFailure::WrongKey);
    }
    Ok(())
}

/// The answer of a node without a key, so that the other side can report the reason.
pub(crate) async fn decline<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<(), KeyFailure> {
    receive::<NONCE_BYTES>(stream).await?;
    send(stream, &[&[HAS_NO_KEY]]).await
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, parts: &[&[u8]]) -> Result<(), KeyFailure> {
    let write = async {
        stream.write_all(&parts.concat()).await?;
        stream.flush().await
    };
    write.await.map_err(|_| KeyFailure::Broken)
}

async fn receive<const BYTES: usize>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<[u8; BYTES], KeyFailure> {
    let mut bytes = [0; BYTES];
    stream.read_exact(&mut bytes).await.map_err(|_| KeyFailure::Broken)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    fn peers() -> (PeerId, PeerId) {
        (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]))
    }

    type Outcome = Result<(), KeyFailure>;

    /// Runs both sides, each with its key and its view of the two peer ids.
    async fn meet(
        (dialer_key, dialer_view): (&SwarmKey, (PeerId, PeerId)),
        (listener_key, listener_view): (&SwarmKey, (PeerId, PeerId)),
    ) -> (Outcome, Outcome) {
        let (one, two) = tokio::io::duplex(256);
        let (mut one, mut two) = (one.compat(), two.compat());
        let dialer = async move {
            let (own, remote) = dialer_view;
            prove(dialer_key, Side::Dialer, own, remote, &mut one).await
        };
        let listener = async move {
            let (own, remote) = listener_view;
            prove(listener_key, Side::Listener, own, remote, &mut two).await
        };
        tokio::join!(dialer, listener)
    }

    #[tokio::test]
    async fn a_proof_needs_the_same_key_and_the_same_peers() {
        let (dialer, listener) = peers();
        let stranger = PeerId::from_seed([3; 32]);
        let (key, other) = (SwarmKey::generate(), SwarmKey::generate());
        let as_seen = (&key, (dialer, listener));
        assert_eq!(meet(as_seen, (&key, (listener, dialer))).await, (Ok(()), Ok(())));
        let refused = (Err(KeyFailure::Refused), Err(KeyFailure::WrongKey));
        assert_eq!(meet(as_seen, (&other, (listener, dialer))).await, refused);
        // A peer in between, which each side takes for the other.
        assert_eq!(meet(as_seen, (&key, (stranger, dialer))).await, refused);
        assert_eq!(meet(as_seen, (&key, (listener, stranger))).await, refused);
    }

    #[tokio::test]
    async fn a_listener_that_only_claims_to_accept_is_detected() {
        let (own, remote) = peers();
        let key = SwarmKey::generate();
        let (one, two) = tokio::io::duplex(256);
        let (mut one, mut two) = (one.compat(), two.compat());
        let liar = async move {
            send(&mut two, &[&[7; NONCE_BYTES]]).await.unwrap();
            let answer = receive::<{ 1 + NONCE_BYTES + PROOF_BYTES }>(&mut two).await.unwrap();
            // It sends back the dialer's own proof.
            send(&mut two, &[&[ACCEPTED], &answer[1 + NONCE_BYTES..]]).await.unwrap();
        };
        let dialer = prove(&key, Side::Dialer, own, remote, &mut one);
        assert_eq!(tokio::join!(dialer, liar).0, Err(KeyFailure::WrongKey));
    }

    #[tokio::test]
    async fn an_answer_cannot_be_replayed() {
        let (own, remote) = peers();
        let key = SwarmKey::generate();
        let mut recorded: Option<[u8; 1 + NONCE_BYTES + PROOF_BYTES]> = None;
        for first in [true, false] {
            let (one, two) = tokio::io::duplex(256);
            let (mut one, mut two) = (one.compat(), two.compat());
            let listener = prove(&key, Side::Listener, own, remote, &mut one);
            let dialer = async {
                if let Some(recorded) = recorded {
                    receive::<NONCE_BYTES>(&mut two).await.unwrap();
                    send(&mut two, &[&recorded]).await.unwrap();
                    receive::<1>(&mut two).await.unwrap();
                } else {
                    let nonce = receive(&mut two).await.unwrap();
                    let handshake = Handshake {
                        dialer: remote,
                        listener: own,
                        dialer_nonce: [9; NONCE_BYTES],
                        listener_nonce: nonce,
                    };
                    let mut answer = [HAS_KEY; 1 + NONCE_BYTES + PROOF_BYTES];
                    answer[1..33].copy_from_slice(&handshake.dialer_nonce);
                    let proof = key.proof(Side::Dialer, &handshake);
                    answer[33..].copy_from_slice(proof.as_bytes());
                    send(&mut two, &[&answer]).await.unwrap();
                    receive::<{ 1 + PROOF_BYTES }>(&mut two).await.unwrap();
                    recorded = Some(answer);
                }
            };
            let (outcome, ()) = tokio::join!(listener, dialer);
            assert_eq!(outcome, if first { Ok(()) } else { Err(KeyFailure::WrongKey) });
        }
    }

    #[tokio::test]
    async fn random_bytes_are_refused() {
        let (own, remote) = peers();
        let key = SwarmKey::generate();
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = <rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(seed);
        for length in [0, 1, 2, 33, 64, 65, 66, 200] {
            for side in [Side::Dialer, Side::Listener] {
                let (one, two) = tokio::io::duplex(1024);
                let (mut one, mut two) = (one.compat(), two.compat());
                let mut bytes = vec![0; length];
                rng.fill_bytes(&mut bytes);
                two.write_all(&bytes).await.unwrap();
                two.close().await.unwrap();
                let outcome = prove(&key, side, own, remote, &mut one).await;
                assert!(outcome.is_err(), "{side:?} took {bytes:?}");
            }
        }
    }

    #[test]
    fn a_gateway_token_is_bound_to_one_key_and_one_node() {
        let (one, other) = peers();
        let (key, another) = (SwarmKey::generate(), SwarmKey::generate());
        let token = key.gateway_token(one);
        assert_eq!((token.len(), &token), (64, &key.gateway_token(one)));
        for wrong in [key.gateway_token(other), another.gateway_token(one)] {
            assert_ne!(token, wrong);
        }
    }

    #[test]
    fn debug_output_hides_the_key() {
        let key = SwarmKey::from_bytes([0xab; 32]);
        assert!(!format!("{key:?}").contains("171") && !format!("{key:?}").contains("ab"));
    }
}
