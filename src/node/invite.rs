//! An invitation to a swarm in one string: its name, where a node of it listens, and its key if it is
//! private. Then the string is a secret.
//!
//! `doppler1` and JSON in base64url: nothing in it needs quotes in a shell. Bounded, because it
//! comes from elsewhere.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::identity::create_private;
use super::swarm_key;

const PREFIX: &str = "doppler1";
/// The longest invitation, in characters, and the most addresses in one.
pub const INVITE_CHARS_MAX: usize = 8192;
pub const ADDRESSES_MAX: usize = 16;
/// The file in the data directory that keeps an invitation's key.
const KEY_FILE: &str = "swarm.key";

/// What an invitation says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    #[serde(rename = "s")]
    pub swarm: String,
    #[serde(rename = "a")]
    pub addresses: Vec<String>,
    /// 64 hexadecimal digits.
    #[serde(rename = "k", default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Invite {
    /// Addresses that other machines can use come before this machine's own.
    pub fn new(swarm: &str, addresses: &[String], key: Option<String>) -> Self {
        let mut addresses = addresses.to_vec();
        let is_own =
            |address: &String| address.starts_with("/ip4/127.") || address.starts_with("/ip6/::1/");
        if !addresses.iter().all(is_own) {
            addresses.retain(|address| !is_own(address));
        }
        addresses.truncate(ADDRESSES_MAX);
        Self { swarm: swarm.to_owned(), addresses, key }
    }

    pub fn text(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        format!("{PREFIX}{}", data_encoding::BASE64URL_NOPAD.encode(&json))
    }

    /// # Errors
    /// If it is none. The error never quotes it: it may hold a key.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let text = text.trim();
        ensure!(
            text.len() <= INVITE_CHARS_MAX,
            "the invitation is longer than {INVITE_CHARS_MAX} characters"
        );
        let coded = text.strip_prefix(PREFIX);
        let json =
            coded.and_then(|coded| data_encoding::BASE64URL_NOPAD.decode(coded.as_bytes()).ok());
        let invite = json.and_then(|json| serde_json::from_slice::<Self>(&json).ok());
        let invite =
            invite.context("this is no invitation, or not all of it: `invite` prints one")?;
        ensure!(
            invite.addresses.len() <= ADDRESSES_MAX,
            "the invitation has more than {ADDRESSES_MAX} addresses"
        );
        Ok(invite)
    }

    /// The file with its key, within the data directory.
    ///
    /// # Errors
    /// If there is another swarm's key already, or the file cannot be written.
    pub fn keep_key(&self, data: &Path) -> anyhow::Result<Option<PathBuf>> {
        let Some(key) = &self.key else { return Ok(None) };
        let path = data.join(KEY_FILE);
        if path.exists() {
            let have = swarm_key::digits(&path)?;
            if have != *key {
                bail!(
                    "{} holds the key of another swarm: remove it, or give another --data",
                    path.display()
                );
            }
            return Ok(Some(path));
        }
        std::fs::create_dir_all(data).with_context(|| data.display().to_string())?;
        create_private(&path, format!("{key}\n").as_bytes())?;
        swarm_key::read(&path).context("the invitation's key is none")?;
        Ok(Some(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invite(key: Option<&str>) -> Invite {
        let addresses = ["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/10.0.0.1/tcp/1/p2p/x"];
        Invite::new("lab", &addresses.map(str::to_owned), key.map(str::to_owned))
    }

    #[test]
    fn an_invitation_is_one_word_that_says_all_of_it() {
        for key in [None, Some("ab")] {
            let invite = invite(key);
            assert_eq!(invite.addresses, ["/ip4/10.0.0.1/tcp/1/p2p/x"]);
            let text = invite.text();
            assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)));
            assert!(Invite::parse(&format!(" {text}\n")).unwrap() == invite);
        }
        let alone = Invite::new("lab", &["/ip4/127.0.0.1/tcp/1".to_owned()], None);
        assert_eq!(alone.addresses.len(), 1);
    }

    #[test]
    fn what_is_none_is_refused_without_being_quoted() {
        let text = invite(Some("secret")).text();
        for bad in ["", "lab", &text[..text.len() - 5], &text[1..], &"x".repeat(9000)] {
            let error = Invite::parse(bad).err().unwrap().to_string();
            assert!(
                error.contains("invitation") && (bad.is_empty() || !error.contains(bad)),
                "{error}"
            );
        }
    }

    #[test]
    fn its_key_is_kept_and_another_swarms_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        assert_eq!(invite(None).keep_key(&data).unwrap(), None);
        let key = "ab".repeat(32);
        let path = invite(Some(&key)).keep_key(&data).unwrap().unwrap();
        assert!(swarm_key::read(&path).is_ok());
        assert_eq!(invite(Some(&key)).keep_key(&data).unwrap().unwrap(), path);
        let other = invite(Some(&"cd".repeat(32))).keep_key(&data).unwrap_err().to_string();
        assert!(other.contains("another swarm"), "{other}");
    }
}
