//! Who knocks: the names by which browsers ask to be connected, read from their first packets.
//!
//! A name is good for one connection. Whoever goes on asking by the name of a connection that
//! has ended gets no second one: its browser holds the keys of the first. All sets are bounded.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::options::{WEBRTC_GONE_MAX, WEBRTC_VISITORS_MAX};

/// What the names of webrtc-direct, version 1, begin with.
const PREFIX: &str = "libp2p+webrtc+v1/";
/// Bytes of the longest name (RFC 8839, 5.4).
const NAME_BYTES_MAX: usize = 256;

const HEADER_BYTES: usize = 20;
const BINDING_REQUEST: [u8; 2] = [0, 1];
const COOKIE: [u8; 4] = 0x2112_a442_u32.to_be_bytes();
const USERNAME: u16 = 6;

/// The name in a STUN binding request (RFC 8489, 5 and 14.3): both ends use the same one. None
/// for any other packet, and for names with characters that have no place in a description of
/// a session (RFC 8839, 5.4).
pub(crate) fn name(packet: &[u8]) -> Option<&str> {
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
            let fits = ours.len() <= NAME_BYTES_MAX && ours.starts_with(PREFIX);
            return (safe && fits && ours == theirs).then_some(ours);
        }
        rest = rest.get(4 + length.next_multiple_of(4)..)?;
    }
}

#[derive(Default)]
pub(crate) struct Visitors {
    here: HashSet<String>,
    /// Those that left last.
    gone: VecDeque<String>,
}

impl Visitors {
    /// False if this one may not.
    fn enter(&mut self, name: &str) -> bool {
        self.here.len() < WEBRTC_VISITORS_MAX
            && !self.gone.iter().any(|gone| gone == name)
            && self.here.insert(name.to_owned())
    }

    fn leave(&mut self, name: &str) {
        if self.here.remove(name) {
            if self.gone.len() == WEBRTC_GONE_MAX {
                self.gone.pop_front();
            }
            self.gone.push_back(name.to_owned());
        }
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.here.len()
    }
}

/// A visitor who is here until this is dropped.
pub(crate) struct Visit {
    name: String,
    visitors: Arc<Mutex<Visitors>>,
}

impl Visit {
    /// None if it may not enter.
    pub(crate) fn begin(visitors: &Arc<Mutex<Visitors>>, name: &str) -> Option<Self> {
        visitors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .enter(name)
            .then(|| Self { name: name.to_owned(), visitors: visitors.clone() })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.visitors.lock().unwrap_or_else(PoisonError::into_inner).leave(&self.name);
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
    fn a_name_is_found_behind_other_attributes_and_odd_packets_have_none() {
        let name_is = format!("{PREFIX}{:x}", rand::random::<u64>());
        let both = format!("{name_is}:{name_is}");
        let packet = request(&[(0x8022, b"seven..".as_slice()), (USERNAME, both.as_bytes())]);
        assert_eq!(name(&packet), Some(&*name_is));
        for end in 0..packet.len() {
            let cut = name(&packet[..end]);
            assert!(cut.is_none() || end >= packet.len() - 3, "{end}");
        }
        let mut reply = packet.clone();
        reply[0] = 1;
        assert_eq!(name(&reply), None);
        let mut other = packet;
        other[4] ^= 1;
        assert_eq!(name(&other), None);
    }

    #[test]
    fn a_name_that_could_write_into_a_description_is_none() {
        let long = "a".repeat(NAME_BYTES_MAX);
        for odd in ["x\r\na=setup:active", "x y", "\u{e4}", long.as_str()] {
            let odd = format!("{PREFIX}{odd}");
            assert_eq!(name(&request(&[(USERNAME, format!("{odd}:{odd}").as_bytes())])), None);
        }
        for odd in
            [format!("{PREFIX}a:{PREFIX}b"), "a:a".into(), format!("{PREFIX}a"), String::new()]
        {
            assert_eq!(name(&request(&[(USERNAME, odd.as_bytes())])), None, "{odd}");
        }
    }

    #[test]
    fn a_name_is_good_for_one_connection_and_all_sets_are_bounded() {
        let mut visitors = Visitors::default();
        for index in 0..WEBRTC_VISITORS_MAX {
            assert!(visitors.enter(&index.to_string()));
        }
        assert!(!visitors.enter("one more"));
        visitors.leave("0");
        assert!(!visitors.enter("0") && !visitors.enter("1"));
        assert!(visitors.enter("one more"));
        visitors.leave("one more");
        for index in 1..WEBRTC_VISITORS_MAX {
            visitors.leave(&index.to_string());
        }
        assert_eq!((visitors.here.len(), visitors.gone.len()), (0, WEBRTC_GONE_MAX));
        visitors.leave("never came");
        assert!(visitors.enter("never came"));
    }
}
