//! The binary and text forms of a multiaddr: a table of protocols, and parsers for both forms.
//!
//! Source of the codes: <https://github.com/multiformats/multicodec/blob/master/table.csv>;
//! source of the `x-parity-` paths: the rust-multiaddr crate. The table has only protocols that
//! could lead to a node; an address with another one is refused.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};

use data_encoding::BASE64URL_NOPAD;

use super::peer::PeerId;

/// The longest address in bytes. Announced addresses are far shorter.
pub(crate) const ADDRESS_BYTES_MAX: usize = 1024;

pub(crate) const IP4: u32 = 4;
pub(crate) const TCP: u32 = 6;
pub(crate) const IP6: u32 = 41;
pub(crate) const UDP: u32 = 273;
pub(crate) const WEBRTC_DIRECT: u32 = 280;
pub(crate) const P2P_CIRCUIT: u32 = 290;
pub(crate) const P2P: u32 = 421;
pub(crate) const QUIC_V1: u32 = 461;
pub(crate) const WS: u32 = 477;
pub(crate) const WSS: u32 = 478;
pub(crate) const WS_WITH_PATH: u32 = 4770;
pub(crate) const WSS_WITH_PATH: u32 = 4780;

/// The form of the argument that follows a protocol's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Argument {
    Nothing,
    Ip4,
    Ip6,
    /// 16 bits, big-endian.
    Port,
    /// 64 bits, big-endian.
    Number,
    /// UTF-8 without a slash, with a length prefix.
    Text,
    /// UTF-8 with a length prefix, percent-encoded in text.
    Path,
    /// A peer id's multihash with a length prefix, in base 58 in text.
    Peer,
    /// A multihash with a length prefix, in multibase `u` (base64url) in text.
    Hash,
}

struct Protocol {
    code: u32,
    name: &'static str,
    argument: Argument,
}

const fn protocol(code: u32, name: &'static str, argument: Argument) -> Protocol {
    Protocol { code, name, argument }
}

const TABLE: [Protocol; 27] = [
    protocol(IP4, "ip4", Argument::Ip4),
    protocol(TCP, "tcp", Argument::Port),
    protocol(IP6, "ip6", Argument::Ip6),
    protocol(42, "ip6zone", Argument::Text),
    protocol(53, "dns", Argument::Text),
    protocol(54, "dns4", Argument::Text),
    protocol(55, "dns6", Argument::Text),
    protocol(56, "dnsaddr", Argument::Text),
    protocol(UDP, "udp", Argument::Port),
    protocol(WEBRTC_DIRECT, "webrtc-direct", Argument::Nothing),
    protocol(281, "webrtc", Argument::Nothing),
    protocol(P2P_CIRCUIT, "p2p-circuit", Argument::Nothing),
    protocol(P2P, "p2p", Argument::Peer),
    protocol(443, "https", Argument::Nothing),
    protocol(448, "tls", Argument::Nothing),
    protocol(449, "sni", Argument::Text),
    protocol(454, "noise", Argument::Nothing),
    protocol(460, "quic", Argument::Nothing),
    protocol(QUIC_V1, "quic-v1", Argument::Nothing),
    protocol(465, "webtransport", Argument::Nothing),
    protocol(466, "certhash", Argument::Hash),
    protocol(WS, "ws", Argument::Nothing),
    protocol(WSS, "wss", Argument::Nothing),
    protocol(480, "http", Argument::Nothing),
    protocol(777, "memory", Argument::Number),
    protocol(WS_WITH_PATH, "x-parity-ws", Argument::Path),
    protocol(WSS_WITH_PATH, "x-parity-wss", Argument::Path),
];

/// One protocol of an address, with its argument's bytes.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    protocol: &'static Protocol,
    argument: &'a [u8],
}

impl Part<'_> {
    pub(crate) const fn code(&self) -> u32 {
        self.protocol.code
    }

    pub(crate) fn ip4(&self) -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = self.argument.try_into().ok()?;
        (self.code() == IP4).then(|| bytes.into())
    }

    pub(crate) fn ip6(&self) -> Option<Ipv6Addr> {
        let bytes: [u8; 16] = self.argument.try_into().ok()?;
        (self.code() == IP6).then(|| bytes.into())
    }

    /// The port of a TCP or UDP part.
    pub(crate) fn port(&self) -> Option<u16> {
        let bytes: [u8; 2] = self.argument.try_into().ok()?;
        (self.protocol.argument == Argument::Port).then(|| u16::from_be_bytes(bytes))
    }

    pub(crate) fn peer(&self) -> Option<PeerId> {
        let peer = (self.code() == P2P).then(|| PeerId::from_bytes(self.argument));
        peer?.ok()
    }
}

impl fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.protocol.name)?;
        let text = || std::str::from_utf8(self.argument).map_err(|_| fmt::Error);
        match self.protocol.argument {
            Argument::Nothing => Ok(()),
            Argument::Ip4 => write!(f, "/{}", self.ip4().ok_or(fmt::Error)?),
            Argument::Ip6 => write!(f, "/{}", self.ip6().ok_or(fmt::Error)?),
            Argument::Port => write!(f, "/{}", self.port().ok_or(fmt::Error)?),
            Argument::Number => {
                let bytes = self.argument.try_into().map_err(|_| fmt::Error)?;
                write!(f, "/{}", u64::from_be_bytes(bytes))
            }
            Argument::Text => write!(f, "/{}", text()?),
            Argument::Path => write!(f, "/{}", percent_encode(text()?)),
            Argument::Peer => write!(f, "/{}", self.peer().ok_or(fmt::Error)?),
            Argument::Hash => write!(f, "/u{}", BASE64URL_NOPAD.encode(self.argument)),
        }
    }
}

/// The first part of an address and the rest. The error is the reason why it has none.
pub(crate) fn split(bytes: &[u8]) -> Result<(Part<'_>, &[u8]), String> {
    let cut = || "it is cut short".to_owned();
    let (code, rest) = varint(bytes).ok_or_else(cut)?;
    let protocol = TABLE.iter().find(|protocol| protocol.code == code);
    let protocol = protocol.ok_or_else(|| format!("protocol {code} is not known"))?;
    let (len, rest) = match protocol.argument {
        Argument::Nothing => (0, rest),
        Argument::Ip4 => (4, rest),
        Argument::Ip6 => (16, rest),
        Argument::Port => (2, rest),
        Argument::Number => (8, rest),
        Argument::Text | Argument::Path | Argument::Peer | Argument::Hash => {
            let (len, rest) = varint(rest).ok_or_else(cut)?;
            (len as usize, rest)
        }
    };
    let (argument, rest) = rest.split_at_checked(len).ok_or_else(cut)?;
    check(protocol, argument)?;
    Ok((Part { protocol, argument }, rest))
}

fn check(protocol: &Protocol, argument: &[u8]) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{} needs {what}", protocol.name));
    match protocol.argument {
        Argument::Text | Argument::Path => {
            let is_path = protocol.argument == Argument::Path;
            let fits = |text: &str| {
                !text.is_empty()
                    && !text.contains(char::is_control)
                    && (is_path && text != "/" || !is_path && !text.contains('/'))
            };
            match std::str::from_utf8(argument) {
                Ok(text) if fits(text) => Ok(()),
                _ => wrong(if is_path { "a path" } else { "a name" }),
            }
        }
        Argument::Peer if PeerId::from_bytes(argument).is_err() => wrong("a peer id"),
        Argument::Hash => match varint(argument) {
            Some((_, [size, digest @ ..]))
                if digest.len() <= 64 && usize::from(*size) == digest.len() =>
            {
                Ok(())
            }
            _ => wrong("a multihash"),
        },
        _ => Ok(()),
    }
}

/// The binary form of an address's text. The error is the reason why it has none.
pub(crate) fn parse(text: &str) -> Result<Vec<u8>, String> {
    let mut words = text.split('/');
    if words.next() != Some("") || text.len() < 2 {
        return Err("it does not begin with '/' and a protocol".to_owned());
    }
    let mut bytes = Vec::new();
    while let Some(name) = words.next() {
        let name = if name == "ipfs" { "p2p" } else { name };
        let protocol = TABLE.iter().find(|protocol| protocol.name == name);
        let protocol = protocol.ok_or_else(|| format!("{name:?} is not a known protocol"))?;
        let argument = match protocol.argument {
            Argument::Nothing => Vec::new(),
            _ => {
                let word = words.next().ok_or_else(|| format!("{name} needs a value"))?;
                let argument = parse_argument(protocol.argument, word);
                argument.ok_or_else(|| format!("{word:?} is not what {name} needs"))?
            }
        };
        let code = match (protocol.code, argument.as_slice()) {
            (WS_WITH_PATH, b"/") => WS,
            (WSS_WITH_PATH, b"/") => WSS,
            (code, _) => code,
        };
        push(&mut bytes, code, &argument)?;
        if bytes.len() > ADDRESS_BYTES_MAX {
            return Err(format!("it is longer than {ADDRESS_BYTES_MAX} bytes"));
        }
    }
    Ok(bytes)
}

/// Appends one part.
pub(crate) fn push(bytes: &mut Vec<u8>, code: u32, argument: &[u8]) -> Result<(), String> {
    let protocol = TABLE.iter().find(|protocol| protocol.code == code);
    let protocol = protocol.ok_or_else(|| format!("protocol {code} is not known"))?;
    put_varint(bytes, code);
    match protocol.argument {
        Argument::Nothing => return Ok(()),
        Argument::Text | Argument::Path | Argument::Peer | Argument::Hash => {
            put_varint(bytes, argument.len() as u32);
        }
        Argument::Ip4 | Argument::Ip6 | Argument::Port | Argument::Number => {}
    }
    check(protocol, argument)?;
    bytes.extend_from_slice(argument);
    Ok(())
}

fn parse_argument(kind: Argument, word: &str) -> Option<Vec<u8>> {
    match kind {
        Argument::Nothing => None,
        Argument::Ip4 => Some(word.parse::<Ipv4Addr>().ok()?.octets().to_vec()),
        Argument::Ip6 => Some(word.parse::<Ipv6Addr>().ok()?.octets().to_vec()),
        Argument::Port => Some(word.parse::<u16>().ok()?.to_be_bytes().to_vec()),
        Argument::Number => Some(word.parse::<u64>().ok()?.to_be_bytes().to_vec()),
        Argument::Text => Some(word.as_bytes().to_vec()),
        Argument::Path => percent_decode(word),
        Argument::Peer => Some(word.parse::<PeerId>().ok()?.to_bytes()),
        Argument::Hash => BASE64URL_NOPAD.decode(word.strip_prefix('u')?.as_bytes()).ok(),
    }
}

/// An unsigned varint of at most 32 bits in its shortest form, and the rest.
fn varint(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let mut value = 0u32;
    for (index, byte) in bytes.iter().take(5).enumerate() {
        let bits = u32::from(byte & 0x7f);
        let shifted = bits.checked_shl(7 * index as u32)?;
        if shifted >> (7 * index) != bits {
            return None;
        }
        value |= shifted;
        if byte & 0x80 == 0 {
            let shortest = index == 0 || *byte != 0;
            return shortest.then(|| (value, &bytes[index + 1..]));
        }
    }
    None
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// The characters that a path segment must not contain: controls, and the URL standard's path
/// percent-encode set with '%' and '/'.
fn percent_encode(text: &str) -> Cow<'_, str> {
    let special = |byte: u8| !(0x20..0x7f).contains(&byte) || b"%/`?{} \"#<>".contains(&byte);
    if !text.bytes().any(special) {
        return text.into();
    }
    let mut out = String::new();
    for byte in text.bytes() {
        if special(byte) {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        } else {
            out.push(char::from(byte));
        }
    }
    out.into()
}

fn percent_decode(word: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| *first == b'%');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_name_and_code_once() {
        for (index, one) in TABLE.iter().enumerate() {
            let rest = &TABLE[index + 1..];
            assert!(rest.iter().all(|other| other.name != one.name && other.code != one.code));
        }
    }

    #[test]
    fn varints_have_one_form() {
        for value in [0, 1, 0x7f, 0x80, 300, 4780, 0x1f_ffff, u32::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            bytes.push(9);
            assert_eq!(varint(&bytes), Some((value, &[9][..])), "{value}");
        }
        for bad in [&[][..], &[0x80], &[0x80, 0], &[0xff, 0xff, 0xff, 0xff, 0x1f], &[0xff; 9]] {
            assert_eq!(varint(bad), None, "{bad:?}");
        }
    }
}
