//! The hash of a file whose bytes come in order, and whose state outlives the process.

use sha1::Sha1;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest, Sha256};

use super::listing::Expected;

/// A SHA-256 under way.
#[derive(Clone, Default)]
pub struct Running(Sha256);

impl Running {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The state, to go on with in another process.
    pub fn save(&self) -> String {
        self.0.serialize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `None` if it is no such state.
    pub fn restore(text: &str) -> Option<Self> {
        let mut state = SerializedState::<Sha256>::default();
        if !text.is_ascii() || text.len() != 2 * state.len() {
            return None;
        }
        for (at, byte) in state.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
        }
        Sha256::deserialize(&state).ok().map(Self)
    }

    pub fn finish(self) -> Expected {
        Expected::Sha256(self.0.finalize().into())
    }
}

/// The hash of the kind of `expected` of a whole file.
pub fn of(bytes: &[u8], expected: Expected) -> Expected {
    match expected {
        Expected::Sha256(_) => Expected::Sha256(Sha256::digest(bytes).into()),
        Expected::GitBlob(_) => {
            let mut hasher = <Sha1 as sha1::Digest>::new();
            sha1::Digest::update(&mut hasher, format!("blob {}\0", bytes.len()));
            sha1::Digest::update(&mut hasher, bytes);
            Expected::GitBlob(sha1::Digest::finalize(hasher).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_goes_on_in_another_process() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|n| n as u8).collect();
        let whole = of(&bytes, Expected::Sha256([0; 32]));
        for cut in [0, 1, 63, 64, 65, 4096, 9999, 10_000] {
            let mut running = Running::default();
            running.update(&bytes[..cut]);
            let mut other = Running::restore(&running.save()).unwrap();
            other.update(&bytes[cut..]);
            assert_eq!(other.finish(), whole, "{cut}");
        }
        assert!(Running::restore("00").is_none() && Running::restore("").is_none());
    }

    #[test]
    fn a_blob_has_gits_hash() {
        // `printf 'hello\n' | git hash-object --stdin`
        let want = Expected::parse("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        assert_eq!(of(b"hello\n", want), want);
    }
}
