//! Content addresses: the BLAKE3 hashes that name shards and models.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Text that is not a 64-digit hexadecimal BLAKE3 hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a BLAKE3 hash (64 hexadecimal digits)")]
pub struct BadHash(pub String);

/// Parses the 64 hexadecimal digits of a 32-byte hash.
fn parse_hash(text: &str) -> Result<[u8; 32], BadHash> {
    blake3::Hash::from_hex(text).map(|hash| *hash.as_bytes()).map_err(|_| BadHash(text.to_owned()))
}

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// The id of these bytes: their BLAKE3 hash.
            pub fn of(bytes: &[u8]) -> Self {
                Self(*blake3::hash(bytes).as_bytes())
            }

            /// The raw 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first ten hexadecimal digits, for people.
            pub fn short(&self) -> String {
                self.to_string()[..10].to_owned()
            }
        }

        impl From<[u8; 32]> for $name {
            fn from(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = BadHash;
            fn from_str(text: &str) -> Result<Self, BadHash> {
                parse_hash(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hash_id! {
    /// The BLAKE3 hash of a content-addressed object: a shard of at most
    /// 64 MiB, a manifest, or a tokenizer file.
    ShardId
}

hash_id! {
    /// The BLAKE3 hash of a model's `manifest.json`: the model's id.
    ModelId
}

impl ModelId {
    /// The address of the manifest, which is an object in the store itself.
    pub const fn manifest(&self) -> ShardId {
        ShardId(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_survives_its_text_form_and_bad_text_is_refused() {
        let id = ShardId::of(b"shard");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("abc".parse::<ShardId>().is_err());
        assert!("z".repeat(64).parse::<ModelId>().is_err());
    }
}
