//! Who published a model: an Ed25519 signature over the model's id, its name
//! and its manifest's size.
//!
//! Invariant: a [`SignedModel`] that `verify` accepts was signed, whole, by the
//! holder of `publisher`'s secret key; no field can be exchanged on the way.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature as DalekSignature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::ModelId;

/// Separates these signatures from other uses of the key. It names the hash function
/// of a `ModelId` and the version of the message.
const DOMAIN: &[u8] = b"doppler-node model announcement v1 blake3\0";

/// The longest model name, in bytes. Names are shown in tables and carried by gossip.
pub const NAME_BYTES_MAX: usize = 128;

/// The largest manifest that can be signed, in bytes: that of any object.
pub const MANIFEST_BYTES_MAX: u64 = super::verified::OBJECT_BYTES_MAX;

/// A publisher's Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// An Ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

/// Why a signed model was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("model {model}: the publisher's signature does not match")]
    Mismatch { model: ModelId },
    #[error("model {model}: {publisher} is not an Ed25519 public key")]
    BadKey { model: ModelId, publisher: PublicKey },
    #[error(
        "model {model}: its name must be 1 to {NAME_BYTES_MAX} bytes without control characters"
    )]
    BadName { model: ModelId },
    #[error("model {model}: a manifest of {size} bytes is not between 1 and {MANIFEST_BYTES_MAX}")]
    BadSize { model: ModelId, size: u64 },
    #[error("{0:?} is not a public key (64 hexadecimal digits)")]
    BadText(String),
}

/// A model as its publisher announces it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedModel {
    pub model: ModelId,
    pub name: String,
    /// Bytes of `manifest.json`.
    pub manifest_size: u64,
    pub publisher: PublicKey,
    pub signature: Signature,
}

impl PublicKey {
    /// The public key of the secret key `seed`.
    pub fn of_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed).verifying_key().to_bytes())
    }
}

impl SignedModel {
    /// Signs with the Ed25519 secret key `seed`.
    pub fn sign(
        seed: &[u8; 32],
        model: ModelId,
        name: &str,
        manifest_size: u64,
    ) -> Result<Self, SignatureError> {
        check_fields(model, name, manifest_size)?;
        let key = SigningKey::from_bytes(seed);
        let publisher = PublicKey(key.verifying_key().to_bytes());
        let signature = key.sign(&message(model, name, manifest_size));
        Ok(Self {
            model,
            name: name.to_owned(),
            manifest_size,
            publisher,
            signature: Signature(signature.to_bytes()),
        })
    }

    /// Checks every field and the signature over them.
    pub fn verify(&self) -> Result<(), SignatureError> {
        check_fields(self.model, &self.name, self.manifest_size)?;
        let key = VerifyingKey::from_bytes(&self.publisher.0)
            .map_err(|_| SignatureError::BadKey { model: self.model, publisher: self.publisher })?;
        let signature = DalekSignature::from_bytes(&self.signature.0);
        // Strict: refuses weak keys, under which one signature fits several messages.
        key.verify_strict(&message(self.model, &self.name, self.manifest_size), &signature)
            .map_err(|_| SignatureError::Mismatch { model: self.model })
    }
}

fn check_fields(model: ModelId, name: &str, size: u64) -> Result<(), SignatureError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(SignatureError::BadName { model });
    }
    if size == 0 || size > MANIFEST_BYTES_MAX {
        return Err(SignatureError::BadSize { model, size });
    }
    Ok(())
}

/// What is signed: the domain, 32 bytes of model id, the manifest's size (u64,
/// little-endian), then the name. The parts before the name have fixed lengths.
fn message(model: ModelId, name: &str, manifest_size: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(DOMAIN.len() + 40 + name.len());
    message.extend_from_slice(DOMAIN);
    message.extend_from_slice(model.as_bytes());
    message.extend_from_slice(&manifest_size.to_le_bytes());
    message.extend_from_slice(name.as_bytes());
    message
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        out.push_str(&format!("{byte:02x}"));
    }
    out
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != N * 2 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0; N];
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(out)
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", hex(&self.0[..5]))
    }
}

impl FromStr for PublicKey {
    type Err = SignatureError;
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        from_hex(text).map(Self).ok_or_else(|| SignatureError::BadText(text.to_owned()))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", hex(&self.0[..5]))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Signature {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        from_hex(&text)
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a signature is 128 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_covers_every_field() {
        let seed: [u8; 32] = rand::random();
        let model = ModelId::of(b"manifest");
        let signed = SignedModel::sign(&seed, model, "tiny", 300).unwrap();
        assert_eq!(signed.publisher, PublicKey::of_seed(&seed));
        assert_eq!(signed.verify(), Ok(()));

        let mismatch = Err(SignatureError::Mismatch { model });
        let renamed = SignedModel { name: "tinY".into(), ..signed.clone() };
        assert_eq!(renamed.verify(), mismatch);
        let resized = SignedModel { manifest_size: 301, ..signed.clone() };
        assert_eq!(resized.verify(), mismatch);
        let other_key = PublicKey::of_seed(&[9; 32]);
        assert_eq!(SignedModel { publisher: other_key, ..signed.clone() }.verify(), mismatch);
        let other = SignedModel { model: ModelId::of(b"other"), ..signed.clone() };
        assert_eq!(other.verify(), Err(SignatureError::Mismatch { model: other.model }));
        for bit in 0..512 {
            let mut flipped = signed.clone();
            flipped.signature.0[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(flipped.verify(), mismatch, "bit {bit}");
        }
    }

    #[test]
    fn fields_out_of_bounds_are_refused_before_and_after_signing() {
        let model = ModelId::of(b"m");
        let bad_name = Err(SignatureError::BadName { model });
        for name in ["", "a\nb", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert_eq!(SignedModel::sign(&[1; 32], model, name, 1), bad_name);
        }
        let too_large = MANIFEST_BYTES_MAX + 1;
        for size in [0, too_large] {
            let refused = SignedModel::sign(&[1; 32], model, "m", size);
            assert_eq!(refused, Err(SignatureError::BadSize { model, size }));
        }
        let mut signed = SignedModel::sign(&[1; 32], model, "m", 1).unwrap();
        signed.publisher = PublicKey([0; 32]);
        assert!(signed.verify().is_err(), "a weak key");
    }

    #[test]
    fn json_and_text_round_trip() {
        let signed = SignedModel::sign(&[3; 32], ModelId::of(b"m"), "m", 1).unwrap();
        let json = serde_json::to_string(&signed).unwrap();
        assert_eq!(serde_json::from_str::<SignedModel>(&json).unwrap(), signed);
        assert_eq!(signed.publisher.to_string().parse(), Ok(signed.publisher));
        assert!("é".repeat(32).parse::<PublicKey>().is_err());
    }
}
