//! The browsers of a listener, by the names (ICE user fragments) in their first packets.
//!
//! A name is valid for one connection. Requests under the name of a connection that has ended are
//! ignored: that browser still uses the keys of the first one. All sets are bounded.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::options::{WEBRTC_CLIENTS_MAX, WEBRTC_ENDED_MAX};

/// The prefix of names in webrtc-direct, version 1.
const PREFIX: &str = "libp2p+webrtc+v1/";
/// The longest name in bytes (RFC 8839, 5.4).
const UFRAG_BYTES_MAX: usize = 256;

const HEADER_BYTES: usize = 20;
const BINDING_REQUEST: [u8; 2] = [0, 1];
const COOKIE: [u8; 4] = 0x2112_a442_u32.to_be_bytes();
const USERNAME: u16 = 6;

/// The name in a STUN binding request (RFC 8489, 5 and 14.3); both ends use the same one. `None`
/// for any other packet, and for names with characters that a session description does not allow
/// (RFC 8839, 5.4).
pub(crate) fn ufrag(packet: &[u8]) -> Option<&str> {
    let header = packet.get(..HEADER_BYTES)?;
    if header[..2] != BINDING_REQUEST || header[4..8] != COOKIE {
        return None;
    }
    let mut rest = &packet[HEADER_BYTES..];
    loop {
        let kind = u16::from_be_bytes(rest.get(..2)?.try_into().ok()?);
        let length = usize::from(u16::from_be_bytes(rest.get(2..4)?.try_into().ok()?));
        if kind == USERNAME {
            let (ours, theirs) =
                std::str::from_utf8(rest.get(4..4 + length)?).ok()?.split_once(':')?;
            let safe =
                ours.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/".contains(&byte));
            let fits = ours.len() <= UFRAG_BYTES_MAX && ours.starts_with(PREFIX);
            return (safe && fits && ours == theirs).then_some(ours);
        }
        rest = rest.get(4 + length.next_multiple_of(4)..)?;
    }
}

#[derive(Default)]
pub(crate) struct Clients {
    connected: HashSet<String>,
    /// The names of connections that ended last.
    ended: VecDeque<String>,
}

impl Clients {
    /// False if this one is refused.
    fn admit(&mut self, name: &str) -> bool {
        self.connected.len() < WEBRTC_CLIENTS_MAX
            && !self.ended.iter().any(|ended| ended == name)
            && self.connected.insert(name.to_owned())
    }

    fn release(&mut self, name: &str) {
        if self.connected.remove(name) {
            if self.ended.len() == WEBRTC_ENDED_MAX {
                self.ended.pop_front();
            }
            self.ended.push_back(name.to_owned());
        }
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.connected.len()
    }
}

/// A client that counts as connected until this is dropped.
pub(crate) struct ClientSlot {
    name: String,
    clients: Arc<Mutex<Clients>>,
}

impl ClientSlot {
    /// `None` if the client is refused.
    pub(crate) fn begin(clients: &Arc<Mutex<Clients>>, name: &str) -> Option<Self> {
        clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .admit(name)
            .then(|| Self { name: name.to_owned(), clients: clients.clone() })
    }

    pub(crate) fn ufrag(&self) -> &str {
        &self.name
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).release(&self.name);
    }
}

#[cfg(test)]
pub(crate) fn request(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend(kind.to_be_bytes());
        body.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        body.extend(*value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    let transaction = rand::random::<[u8; 12]>();
    [&BINDING_REQUEST[..], &length, &COOKIE, &transaction, &body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_after_other_attributes_and_odd_packets_have_none() {
        let name_is = format!("{PREFIX}{:x}", rand::random::<u64>());
        let both = format!("{name_is}:{name_is}");
        let packet = request(&[(0x8022, b"seven..".as_slice()), (USERNAME, both.as_bytes())]);
        assert_eq!(ufrag(&packet), Some(&*name_is));
        for end in 0..packet.len() {
            let cut = ufrag(&packet[..end]);
            assert!(cut.is_none() || end >= packet.len() - 3, "{end}");
        }
        let mut reply = packet.clone();
        reply[0] = 1;
        assert_eq!(ufrag(&reply), None);
        let mut other = packet;
        other[4] ^= 1;
        assert_eq!(ufrag(&other), None);
    }

    #[test]
    fn a_name_that_could_inject_into_a_description_is_refused() {
        let long = "a".repeat(UFRAG_BYTES_MAX);
        for odd in ["x\r\na=setup:active", "x y", "\u{e4}", long.as_str()] {
            let odd = format!("{PREFIX}{odd}");
            assert_eq!(ufrag(&request(&[(USERNAME, format!("{odd}:{odd}").as_bytes())])), None);
        }
        for odd in
            [format!("{PREFIX}a:{PREFIX}b"), "a:a".into(), format!("{PREFIX}a"), String::new()]
        {
            assert_eq!(ufrag(&request(&[(USERNAME, odd.as_bytes())])), None, "{odd}");
        }
    }

    #[test]
    fn a_name_is_valid_for_one_connection_and_all_sets_are_bounded() {
        let mut clients = Clients::default();
        for index in 0..WEBRTC_CLIENTS_MAX {
            assert!(clients.admit(&index.to_string()));
        }
        assert!(!clients.admit("one more"));
        clients.release("0");
        assert!(!clients.admit("0") && !clients.admit("1"));
        assert!(clients.admit("one more"));
        clients.release("one more");
        for index in 1..WEBRTC_CLIENTS_MAX {
            clients.release(&index.to_string());
        }
        assert_eq!((clients.connected.len(), clients.ended.len()), (0, WEBRTC_ENDED_MAX));
        clients.release("never came");
        assert!(clients.admit("never came"));
    }
}
