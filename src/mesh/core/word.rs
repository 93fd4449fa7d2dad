//! What a gossip message says. It is decoded, and a signature in it verified, once for all that are told of
//! it (a simulator tells thousands), and not before somebody asks: a flooder's words cost nothing.
//!
//! Invariant: says what its bytes say, whoever asks and when.

use std::sync::{Arc, OnceLock};

use doppler_ids::Address;
use doppler_store::signature::{SignatureError, SignedModel};

use crate::wire::{Envelope, WireError};

/// The data of a gossip message. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Word(Arc<Data>);

#[derive(Debug)]
struct Data {
    bytes: Vec<u8>,
    said: OnceLock<Said>,
    /// Whether an announcement is signed by its publisher.
    signature: OnceLock<Result<(), SignatureError>>,
}

#[derive(Debug)]
struct Said {
    envelope: Result<Envelope, WireError>,
    /// Those in a message of holdings that are well formed.
    addresses: Vec<Address>,
}

impl Word {
    pub fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }

    fn said(&self) -> &Said {
        self.0.said.get_or_init(|| {
            let envelope = Envelope::decode(&self.0.bytes);
            let texts = match &envelope {
                Ok(Envelope::Holdings(holdings)) => holdings.addresses.as_slice(),
                _ => &[],
            };
            let addresses = texts.iter().filter_map(|text| text.parse().ok()).collect();
            Said { envelope, addresses }
        })
    }

    /// What it says.
    pub fn envelope(&self) -> &Result<Envelope, WireError> {
        &self.said().envelope
    }

    /// Where the author listens, if it says so.
    pub(super) fn addresses(&self) -> &[Address] {
        &self.said().addresses
    }

    /// Whether `signed`, the announcement in here, is signed by its publisher.
    pub(super) fn verify(&self, signed: &SignedModel) -> Result<(), SignatureError> {
        self.0.signature.get_or_init(|| signed.verify()).clone()
    }
}

impl From<Vec<u8>> for Word {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Data { bytes, said: OnceLock::new(), signature: OnceLock::new() }))
    }
}
