//! The page's key: what a page of this node shows to do more than look.
//!
//! The page itself has no secret, as anybody on this machine can fetch it. `doppler-node page` prints
//! its address with the key behind `#`, which no browser sends anywhere. The key lies in `page.key` of
//! the data directory, which only the owner can read, and outlives the node, so that a page that is open goes on
//! after a restart; who deletes the file revokes it with the next start.
//!
//! It opens the APIs and those routes of the control API that a page needs, and only to the page of
//! this very address: never to another site, nor to a page of another port.

use std::path::Path;

use anyhow::Context;
use axum::http::{HeaderMap, header};
use doppler_store::regular;
use rand::Rng;

use super::gateway::is_loopback;
use super::http;
use super::identity::write_private;

/// Bytes of a key; it is written in hexadecimal.
const KEY_BYTES: usize = 16;

/// The key of one data directory.
pub struct PageKey {
    key: String,
    bearer: String,
}

impl PageKey {
    /// Reads the key. The first time, or if the file holds something else, makes and stores one.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn load_or_create(data: &Path) -> anyhow::Result<Self> {
        let path = data.join("page.key");
        let is_key = |text: &String| {
            text.len() == 2 * KEY_BYTES
                && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let stored = match regular::read(&path) {
            Ok(bytes) => String::from_utf8(bytes).ok().filter(is_key),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let key = match stored {
            Some(key) => key,
            None => {
                let mut secret = [0; KEY_BYTES];
                rand::rng().fill_bytes(&mut secret);
                let key: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
                write_private(&path, key.as_bytes())?;
                key
            }
        };
        let bearer = format!("Bearer {key}");
        Ok(Self { key, bearer })
    }

    /// The page's address with the key. A secret.
    pub fn link(&self, page: &str) -> String {
        format!("{page}/#key={}", self.key)
    }

    /// Whether these headers show the key, and come from this node's page or from no page at all.
    pub fn opens(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION);
        given.is_some_and(|given| http::is_same_secret(given.as_bytes(), self.bearer.as_bytes()))
            && is_from_own_page(headers)
    }
}

/// Whether a request's origin, if it has one, is the very host that it asks, and that host is this machine.
fn is_from_own_page(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let Some(host) = text(header::HOST).filter(|host| is_loopback(host)) else { return false };
    let is_own = match text(header::ORIGIN) {
        Some(origin) => origin.strip_prefix("http://") == Some(host),
        None => true,
    };
    // A browser says so, whatever the script sets.
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    is_own && matches!(site, None | Some(b"same-origin" | b"none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_key_stays_and_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = PageKey::load_or_create(dir.path()).unwrap();
        let again = PageKey::load_or_create(dir.path()).unwrap();
        assert_eq!(first.key, again.key);
        assert_eq!(first.key.len(), 2 * KEY_BYTES);
        assert_eq!(
            first.link("http://127.0.0.1:1"),
            format!("http://127.0.0.1:1/#key={}", first.key)
        );
        let path = dir.path().join("page.key");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        // What is no key opens nothing.
        for damaged in ["", "zz", &first.key[1..]] {
            std::fs::write(&path, damaged).unwrap();
            let made = PageKey::load_or_create(dir.path()).unwrap();
            assert_ne!(made.key, first.key);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), made.key);
        }
    }

    #[test]
    fn only_the_page_of_this_very_address_may_show_it() {
        let dir = tempfile::tempdir().unwrap();
        let key = PageKey::load_or_create(dir.path()).unwrap();
        let bearer = key.bearer.clone();
        let opens = |more: &[(&'static str, &str)]| {
            let mut pairs = vec![("authorization", bearer.as_str())];
            pairs.extend(more);
            key.opens(&headers(&pairs))
        };
        let local = ("host", "127.0.0.1:3677");
        assert!(opens(&[local]), "a program");
        assert!(opens(&[
            local,
            ("origin", "http://127.0.0.1:3677"),
            ("sec-fetch-site", "same-origin")
        ]));
        for origin in [
            "https://evil.example",
            "null",
            "http://127.0.0.1:3678",
            "http://127.0.0.1",
            "https://127.0.0.1:3677",
            "http://localhost:3677",
        ] {
            assert!(!opens(&[local, ("origin", origin)]), "{origin}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!opens(&[local, ("sec-fetch-site", site)]), "{site}");
        }
        assert!(!opens(&[("host", "evil.example:3677")]), "DNS rebinding");
        assert!(!opens(&[("host", "evil.example"), ("origin", "http://evil.example")]));
        assert!(!opens(&[]), "no host");
        assert!(!key.opens(&headers(&[local])), "no key");
        let wrong = format!("Bearer {}", "0".repeat(2 * KEY_BYTES));
        assert!(!key.opens(&headers(&[local, ("authorization", &wrong)])));
    }
}
