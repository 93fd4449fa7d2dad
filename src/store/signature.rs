//! Who published a model: an Ed25519 signature over the model's id, its name, its manifest's size,
//! the number of copies that it should have, and the time at which it was signed.
//!
//! The last two came later. Without them, a signature is of the first version: the model has the
//! default number of copies. Invariant: a [`SignedModel`] that `verify` accepts was signed, whole,
//! by the holder of `publisher`'s secret key; no field can be exchanged or left out on the way.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature as DalekSignature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::{BadReplicas, ModelId, Replicas};

/// Separates these signatures from other uses of the key. It names the hash function
/// of a `ModelId` and the version of the message.
const DOMAIN: &[u8] = b"doppler-node model announcement v1 blake3\0";
/// The same, of messages that contain the number of copies and the time.
const DOMAIN_2: &[u8] = b"doppler-node model announcement v2 blake3\0";

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
    #[error("model {model}: {bad}")]
    BadReplicas { model: ModelId, bad: BadReplicas },
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
    /// How many copies the publisher wants.
    #[serde(default, skip_serializing_if = "Replicas::is_default")]
    pub replicas: Replicas,
    /// When it was signed, in milliseconds of the publisher's clock since 1970: of two announcements
    /// of one publisher, the later one counts. 0 if it does not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub signed_ms: u64,
    pub publisher: PublicKey,
    pub signature: Signature,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl PublicKey {
    /// The public key of the secret key `seed`.
    pub fn of_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed).verifying_key().to_bytes())
    }
}

impl SignedModel {
    /// Signs with the Ed25519 secret key `seed`: the default number of copies, and no time.
    pub fn sign(
        seed: &[u8; 32],
        model: ModelId,
        name: &str,
        manifest_size: u64,
    ) -> Result<Self, SignatureError> {
        Self::sign_at(seed, model, name, manifest_size, Replicas::DEFAULT, 0)
    }

    /// Signs with the Ed25519 secret key `seed`, at a time in milliseconds since 1970.
    pub fn sign_at(
        seed: &[u8; 32],
        model: ModelId,
        name: &str,
        manifest_size: u64,
        replicas: Replicas,
        signed_ms: u64,
    ) -> Result<Self, SignatureError> {
        let key = SigningKey::from_bytes(seed);
        let mut signed = Self {
            model,
            name: name.to_owned(),
            manifest_size,
            replicas,
            signed_ms,
            publisher: PublicKey(key.verifying_key().to_bytes()),
            signature: Signature([0; 64]),
        };
        signed.check_fields()?;
        signed.signature = Signature(key.sign(&signed.message()).to_bytes());
        Ok(signed)
    }

    /// Whether this announcement counts rather than another of the same model and publisher.
    pub const fn is_later(&self, than: &Self) -> bool {
        self.signed_ms >= than.signed_ms
    }

    /// Checks every field and the signature over them.
    pub fn verify(&self) -> Result<(), SignatureError> {
        self.check_fields()?;
        let key = VerifyingKey::from_bytes(&self.publisher.0)
            .map_err(|_| SignatureError::BadKey { model: self.model, publisher: self.publisher })?;
        let signature = DalekSignature::from_bytes(&self.signature.0);
        // Strict: refuses weak keys, under which one signature fits several messages.
        key.verify_strict(&self.message(), &signature)
            .map_err(|_| SignatureError::Mismatch { model: self.model })
    }

    fn check_fields(&self) -> Result<(), SignatureError> {
        let Self { model, ref name, manifest_size: size, replicas, .. } = *self;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(SignatureError::BadName { model });
        }
        if size == 0 || size > MANIFEST_BYTES_MAX {
            return Err(SignatureError::BadSize { model, size });
        }
        if !replicas.is_valid() {
            let bad = BadReplicas(replicas.to_string());
            return Err(SignatureError::BadReplicas { model, bad });
        }
        Ok(())
    }

    /// What is signed: the domain, 32 bytes of model id, the manifest's size (u64, little-endian),
    /// in the second version the least and the most copies and the time (u64 each), then the name.
    /// The parts before the name have fixed lengths.
    fn message(&self) -> Vec<u8> {
        let is_first = self.replicas.is_default() && self.signed_ms == 0;
        let mut message = Vec::with_capacity(DOMAIN_2.len() + 64 + self.name.len());
        message.extend_from_slice(if is_first { DOMAIN } else { DOMAIN_2 });
        message.extend_from_slice(self.model.as_bytes());
        message.extend_from_slice(&self.manifest_size.to_le_bytes());
        if !is_first {
            let Replicas { min, max } = self.replicas;
            for number in [min as u64, max as u64, self.signed_ms] {
                message.extend_from_slice(&number.to_le_bytes());
            }
        }
        message.extend_from_slice(self.name.as_bytes());
        message
    }
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
    fn the_number_of_copies_is_signed_and_older_signatures_stay_valid() {
        let (seed, model) = ([7; 32], ModelId::of(b"m"));
        let replicas = Replicas { min: 4, max: 5 };
        let sign = |replicas, at| SignedModel::sign_at(&seed, model, "m", 9, replicas, at);
        let signed = sign(replicas, 77).unwrap();
        assert_eq!(signed.verify(), Ok(()));
        let mismatch = Err(SignatureError::Mismatch { model });
        for other in [Replicas { min: 3, ..replicas }, Replicas { max: 6, ..replicas }] {
            assert_eq!(SignedModel { replicas: other, ..signed.clone() }.verify(), mismatch);
        }
        assert_eq!(SignedModel { signed_ms: 78, ..signed.clone() }.verify(), mismatch);
        let stripped = SignedModel { replicas: Replicas::DEFAULT, signed_ms: 0, ..signed.clone() };
        assert_eq!(stripped.verify(), mismatch, "nobody can leave them out");
        assert_eq!(sign(Replicas::DEFAULT, 1).unwrap().verify(), Ok(()));
        for (min, max) in [(0, 4), (5, 4), (2, 65)] {
            let error = sign(Replicas { min, max }, 0).unwrap_err().to_string();
            assert!(error.contains(&format!("{min}:{max}")) && error.contains("at most 64"));
        }
        let json = serde_json::to_string(&signed).unwrap();
        assert_eq!(serde_json::from_str::<SignedModel>(&json).unwrap(), signed);

        // Written before there were numbers of copies.
        let text =
            r#"{"model":"MODEL","name":"m","manifest_size":9,"publisher":"KEY","signature":"SIG"}"#;
        let old = SignedModel::sign(&seed, model, "m", 9).unwrap();
        let signature: String = old.signature.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = text.replace("MODEL", &model.to_string()).replace("SIG", &signature);
        let read: SignedModel =
            serde_json::from_str(&text.replace("KEY", &old.publisher.to_string())).unwrap();
        assert_eq!((read.verify(), read.replicas), (Ok(()), Replicas::DEFAULT));
        assert!(signed.is_later(&old) && !old.is_later(&signed));
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
